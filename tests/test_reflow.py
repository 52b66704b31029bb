"""Reflow against exact flows: costs, straightness, maps; pairs that are never lost."""

import json

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import G1
from scipy.stats import norm

import sdegen
from sdegen import coupling, nets, prediction
from sdegen.data import ring
from sdegen.mesh import make_mesh
from sdegen.metrics import sliced_w2
from sdegen.training.pair_store import Log

KEY = jax.random.key(0)
TIGHT = {"solver": diffrax.Dopri8(), "grid": sdegen.Adaptive(1e-11, 1e-11)}
SIGMA0 = np.array([[2.0, 1.2], [1.2, 1.0]])
SIGMA1 = np.diag([1.0, 0.2])
"""Data and noise: two Gaussians that do not commute."""


class Linear(eqx.Module):
    """v = M(t) x, on a batch."""

    matrix: callable = eqx.field(static=True)

    def __call__(self, t, x, cond):
        return jax.vmap(lambda t, x: self.matrix(t) @ x)(t, x)


def flat(network, noise=None):
    base = sdegen.Gaussian() if noise is None else noise
    interpolant = sdegen.StochasticInterpolant(latent=None, noise=base)
    return sdegen.VelocityModel(network, interpolant)


def independent(t):
    """The exact velocity of independent Gaussian ends: Cov(x1 - x0, x_t) Sigma_t^-1."""
    mix = (1 - t) ** 2 * jnp.asarray(SIGMA0) + t**2 * jnp.asarray(SIGMA1)
    rate = t * jnp.asarray(SIGMA1) - (1 - t) * jnp.asarray(SIGMA0)
    return rate @ jnp.linalg.inv(mix)


def points(cov, n=4096):
    """Points with this covariance, exactly."""
    z = np.random.default_rng(0).normal(size=(n, len(cov)))
    own = np.atleast_2d(np.cov(z.T, bias=True))
    z = (z - z.mean(0)) @ np.linalg.inv(np.linalg.cholesky(own)).T
    return z @ np.linalg.cholesky(cov).T


# -- known answers ---------------------------------------------------------------------


def test_a_flow_from_a_law_to_itself():
    """Independent ends cost 2, the flow 0; it bends by 2 - pi / 2, and then no more."""

    def swell(t):  # x_t = x0 sqrt((1 - t)^2 + t^2)
        return ((2 * t - 1) / ((1 - t) ** 2 + t**2)) * jnp.eye(1)

    z = points(np.eye(1), 2048)
    pairs = sdegen.reflow(KEY, flat(Linear(swell)), z.shape, start=z, grid=400)
    watched = np.mean(z[:1024] ** 2)  # S is that of the first paths
    print(pairs.straightness, 2 - np.pi / 2)
    assert pairs.transport_cost < 1e-8
    assert abs(pairs.straightness / watched - (2 - np.pi / 2)) < 1e-4
    again = flat(Linear(lambda t: jnp.zeros((1, 1))))
    still = sdegen.reflow(KEY, again, (64, 1), start=z[:64], grid=10)
    assert still.straightness < 1e-12


def test_rectified_gaussians_are_straight_and_not_optimal():
    model, z = flat(Linear(independent)), points(SIGMA1)
    basis = sdegen.sample(KEY, model, (2, 2), start=jnp.eye(2), **TIGHT)
    a = np.asarray(basis.x).T  # x0 = A x1
    assert np.abs(a @ SIGMA1 @ a.T - SIGMA0).max() < 1e-9
    eigenvalues = np.sort(np.linalg.eigvals(a).real)
    inverse = np.sort(np.linalg.eigvals(np.linalg.inv(a)).real)
    golden = np.array([0.3900, 1.5323])
    assert min(np.abs(e - golden).max() for e in (eigenvalues, inverse)) < 1e-4
    pairs = sdegen.reflow(KEY, model, z.shape, start=z, **TIGHT, batch_size=4096)
    rows = np.trace(SIGMA0) + np.trace(SIGMA1)
    print(pairs.transport_cost, pairs.straightness, rows)
    assert abs(rows - 4.2) < 1e-12
    assert abs(pairs.transport_cost - 1.0861817309) < 1e-6
    assert sdegen.metrics.gaussian_w2(
        np.zeros(2), SIGMA0, np.zeros(2), SIGMA1
    ) ** 2 == pytest.approx(0.8121818105, abs=1e-9)
    fine = sdegen.reflow(KEY, model, (1024, 2), start=points(SIGMA1, 1024), grid=400)
    assert abs(fine.straightness - 0.66823) < 1e-3

    def straight(t):  # the flow of the pairs x0 = A x1
        return (jnp.eye(2) - a) @ jnp.linalg.inv((1 - t) * a + t * jnp.eye(2))

    second = flat(Linear(straight))
    again = sdegen.reflow(KEY, second, (1024, 2), start=z[:1024], grid=50)
    assert again.straightness < 1e-9
    np.testing.assert_allclose(again.x0, z[:1024] @ a.T, atol=1e-5)


def test_on_the_line_the_rectified_map_is_the_monotone_one():
    q = (np.arange(200) + 0.5) / 200
    q = q[np.abs(q - 0.3) > 0.01]  # 0.3 is the border between the two modes
    z = norm.ppf(q)[:, None]
    exact = np.asarray(G1.quantile(q))
    model = G1.denoiser(sdegen.RectifiedFlow(t_min=1e-8))
    pairs = sdegen.reflow(KEY, model, z.shape, start=z, **TIGHT)
    error = np.abs(np.asarray(G1.cdf(pairs.x0[:, 0])) - q).max()
    print(f"quantiles {error:.1e}, cost {pairs.transport_cost:.6f}")
    assert error < 5e-6
    assert abs(pairs.transport_cost - np.mean((exact - z[:, 0]) ** 2)) < 1e-6
    np.testing.assert_allclose(pairs.x1, z, rtol=1e-6)


# -- pairs -----------------------------------------------------------------------------


def law_and_model():
    law = ring()
    return law, law.denoiser(sdegen.RectifiedFlow())


def test_pairs_are_the_same_in_any_parts_and_on_a_mesh():
    _, model = law_and_model()
    options = {"grid": 8, "progress": False}
    whole = sdegen.reflow(KEY, model, (40, 2), **options)
    parts = sdegen.reflow(KEY, model, (40, 2), batch_size=16, **options)
    mesh = sdegen.reflow(KEY, model, (40, 2), mesh=make_mesh("data:8"), **options)
    for other in (parts, mesh):
        np.testing.assert_array_equal(other.x1, whole.x1)
        np.testing.assert_allclose(other.x0, whole.x0, atol=1e-6)
        assert other.straightness == pytest.approx(whole.straightness)
    start = sdegen.sample(KEY, model, (40, 2), start=jnp.asarray(whole.x1), grid=8)
    np.testing.assert_allclose(start.x, whole.x0, atol=1e-3)
    cost = ((whole.x0 - whole.x1) ** 2).sum(1)
    assert whole.transport_cost == pytest.approx(cost.mean(), rel=1e-5)
    assert whole.evaluations == 8


def test_a_call_that_was_killed_goes_on(tmp_path, monkeypatch):
    _, model = law_and_model()
    options = {"grid": 4, "batch_size": 16, "progress": False}
    whole = sdegen.reflow(KEY, model, (60, 2), **options)
    finish, done = Log.finish, []

    def stop(self, n):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(n)
        finish(self, n)

    monkeypatch.setattr(Log, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        sdegen.reflow(KEY, model, (60, 2), directory=tmp_path, **options)
    assert json.loads((tmp_path / "pairs.json").read_text())["done"] == 32
    monkeypatch.setattr(
        Log, "finish", lambda self, n: (done.append(n), finish(self, n))
    )
    again = sdegen.reflow(KEY, model, (60, 2), directory=tmp_path, **options)
    assert done == [16, 32, 48, 60]  # nothing twice
    np.testing.assert_array_equal(again.x0, whole.x0)
    np.testing.assert_array_equal(again.x1, whole.x1)
    third = sdegen.reflow(KEY, model, (60, 2), directory=tmp_path, **options)
    np.testing.assert_array_equal(third.x0, whole.x0)
    assert len(done) == 4 and third.evaluations == 4
    with pytest.raises(
        ValueError, match="holds pairs of another call: n was 60, now 9"
    ):
        sdegen.reflow(KEY, model, (9, 2), directory=tmp_path, **options)
    other = ring(std=0.2).denoiser(sdegen.RectifiedFlow())
    for changed in ({"model": other}, {"grid": 5}):
        given = {"model": model, **options, **changed}
        with pytest.raises(ValueError, match="another call: model, start, cond or"):
            sdegen.reflow(KEY, shape=(60, 2), directory=tmp_path, **given)


def test_pairs_stream_into_training_as_they_belong_together(float32):
    _, model = law_and_model()
    cond = np.arange(50)
    pairs = sdegen.reflow(KEY, model, (50, 2), grid=4, cond=cond, progress=False)
    x0, ends = next(pairs.stream.batches(0, 0, batch_size=20, rows=slice(0, 20)))
    np.testing.assert_array_equal(x0, pairs.x0[ends.cond])
    np.testing.assert_array_equal(ends.x1, pairs.x1[ends.cond])


def test_upward_pairs_start_from_the_data():
    x0 = np.random.default_rng(0).normal(size=(30, 2))
    model = sdegen.Forward(flat(Linear(independent)), sdegen.Gaussian())
    pairs = sdegen.reflow(KEY, model, x0.shape, start=x0, grid=20, progress=False)
    np.testing.assert_allclose(pairs.x0, x0, rtol=1e-6)
    assert np.abs(pairs.x1 - x0).max() > 0.1


def test_distillation_looks_at_the_start_of_the_paths():
    path, u = sdegen.RectifiedFlow(), jnp.linspace(0.01, 0.99, 50)
    assert np.ptp(sdegen.times.EulerTimes().quantile(path, u)) == 0
    assert sdegen.times.EulerTimes().quantile(path, u)[0] == path.t_max
    nodes, counts = np.unique(
        np.round(sdegen.times.EulerTimes(4).quantile(path, u), 3), return_counts=True
    )
    grid = sdegen.UniformGrid(4)(path)[:-1]
    np.testing.assert_allclose(np.sort(grid), nodes, atol=1e-3)
    assert counts.min() >= 12


def test_rounds_go_on_where_they_were_stopped(tmp_path, float32):
    data = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    network = nets.MLPConfig(width=8, depth=1)((2,), jax.random.key(1))
    kind, path = prediction.velocity, sdegen.RectifiedFlow()
    options = {"steps": 4, "batch_size": 16, "steps_per_call": 2, "progress": False}

    def run(directory):
        model = sdegen.Denoiser(network, path, kind)
        return sdegen.rectify(
            KEY, model, data, n=32, pairs={"grid": 4}, directory=directory, **options
        )

    whole = list(run(None))
    first = next(run(tmp_path))  # stopped after the first round
    seen = list(run(tmp_path))
    for a, b in zip([first, *seen], [whole[0], *whole], strict=True):
        np.testing.assert_array_equal(a.pairs.x0, b.pairs.x0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-1", "round-2"]


# -- training --------------------------------------------------------------------------


@pytest.mark.slow
def test_reflow_straightens_a_trained_flow(well_compiled, float32):
    law = ring()
    data = np.asarray(law.sample(KEY, 8192))
    test = np.asarray(law.sample(jax.random.key(9), 4096))
    network = nets.MLPConfig(width=48, depth=2)((2,), jax.random.key(1))
    model = sdegen.Denoiser(
        network, sdegen.RectifiedFlow(), prediction.velocity, sigma_data=data.std()
    )
    found = []
    options = {
        "batch_size": 256,
        "steps_per_call": 200,
        "optimizer": sdegen.AdamW(learning_rate=3e-3),
        "progress": False,
    }
    for done in sdegen.rectify(KEY, model, data, steps=800, n=8192, **options):
        found.append((done.pairs, one_step(done.model, test)))
    (first, before), (second, after) = found
    last = sdegen.fit(
        done.model,
        second.stream,
        steps=400,
        loss=eqx.Partial(
            sdegen.denoising_loss,
            coupling=coupling.paired,
            times=sdegen.times.EulerTimes(1),
        ),
        **options,
    )
    distilled = one_step(last.model, test)
    print(first.straightness, second.straightness, before, after, distilled)
    assert second.straightness < first.straightness / 3
    assert after < before / 2 and distilled < before / 2
    error = np.hypot(first.transport_cost_error, second.transport_cost_error)
    assert second.transport_cost < first.transport_cost + 3 * error


def one_step(model, test):
    out = sdegen.sample(KEY, model, test.shape, solver=diffrax.Euler(), grid=1)
    return float(sliced_w2(jax.random.key(3), np.asarray(out.x), test).value)


# -- mistakes --------------------------------------------------------------------------


def reflow(shape=(8, 2), **options):
    return sdegen.reflow(KEY, law_and_model()[1], shape, progress=False, **options)


REFUSED = {
    "needs the shape of its pairs": lambda: reflow((8,)),
    r"start must have the shape \(8, 2\), got \(3, 2\)": lambda: reflow(
        start=np.zeros((3, 2))
    ),
    "cond needs one row for each of the 8 pairs": lambda: reflow(cond=np.arange(3)),
    "or gets a loss= that takes a coupling, got SimulatedPrior": lambda: next(
        sdegen.rectify(
            KEY, sdegen.SimulatedPrior(sdegen.VP(), np.ones((4, 2))), np.zeros((4, 2))
        )
    ),
    "not finite there": lambda: sdegen.reflow(
        KEY, flat(lambda t, x, cond: x / 0), (4, 2), progress=False
    ),
    "leave n out": lambda: next(
        sdegen.rectify(KEY, flat(Linear(independent)), np.zeros((4, 2)), n=9, cond=KEY)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_mistakes_are_answered_with_a_sentence(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
