"""Couplings: plans against linear programs and closed forms; labels, meshes, errors."""

import itertools
import os
import subprocess
import sys
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import sdegen
from sdegen import coupling, nets
from sdegen.data import one_hot
from sdegen.losses.coupling import EntropicOT, ExactOT, Pairs
from sdegen.losses.coupling.costs import cost_matrix, plans
from sdegen.losses.coupling.sinkhorn import potentials
from sdegen.mesh import make_mesh
from sdegen.metrics import transport, w2

KEY = jax.random.key(0)


def two_clouds(n, d=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), 1 + 2 * rng.normal(size=(n, d))


def compiled(plan):
    return jax.jit(lambda *arguments: plan(*arguments))


def square(a, b):
    return ((a[:, None] - b) ** 2).sum(-1)


# -- Sinkhorn --------------------------------------------------------------------------


def gaussian_plan(s0, s1, eps, **options):
    """The entropic plan of two normal laws on a fine grid, and its covariance."""
    x, y = (s * np.linspace(-9, 9, 201) for s in (s0, s1))
    log_a, log_b = (-0.5 * (v / s) ** 2 for v, s in ((x, s0), (y, s1)))
    log_a, log_b = (v - np.log(np.exp(v).sum()) for v in (log_a, log_b))
    cost = jnp.asarray((x[:, None] - y) ** 2)
    found = potentials(
        cost, 2 * eps, jnp.asarray(log_a), jnp.asarray(log_b), tolerance=0, **options
    )
    plan = np.exp((found.f[:, None] + found.g - cost) / (2 * eps))
    plan = plan * np.exp(log_a[:, None] + log_b)
    return plan, np.exp(log_a), np.exp(log_b), x @ plan @ y


@pytest.mark.parametrize("s0, s1, eps", [(1, 2, 0.5), (1, 1, 1.0), (1, 2, 50.0)])
def test_proportional_fitting_finds_the_bridge_of_two_gaussians(s0, s1, eps):
    # eps is the variance of the Brownian motion: 2 eps regularises |x - y|^2
    exact = (-eps + np.sqrt(eps**2 + 4 * s0**2 * s1**2)) / 2
    plain = {"relaxation": 1.0, "start": 2 * eps, "max_iterations": 40}
    plan, a, b, found = gaussian_plan(s0, s1, eps, **plain)
    assert abs(found - exact) < 1e-8
    assert np.abs(plan.sum(0) - b).max() < 1e-14  # after its half step, exactly
    assert np.abs(plan.sum(1) - a).max() < 1e-9


def test_golden_numbers_of_the_bridge():
    for s0, s1, eps, golden in ((1, 2, 0.5, 1.7655644371), (1, 1, 1.0, 0.6180339887)):
        assert abs(gaussian_plan(s0, s1, eps, max_iterations=60)[3] - golden) < 1e-9
    for eps, near in ((0.2, 1.9024984394500787), (0.05, 1.9751562438969614)):  # to OT
        assert abs(gaussian_plan(1, 2, eps, max_iterations=600)[3] - near) < 1e-7
    assert abs(gaussian_plan(1, 2, 1e3, max_iterations=20)[3]) < 1e-2  # independent


def test_relaxation_reaches_the_same_plan_in_fewer_iterations():
    x, y = two_clouds(40)
    cost = jnp.asarray(square(x, y))
    slow = potentials(cost, 0.5, tolerance=1e-6, max_iterations=5000, relaxation=1.0)
    fast = potentials(cost, 0.5, tolerance=1e-6, max_iterations=5000)
    assert slow.converged and fast.converged
    print(slow.iterations, fast.iterations)
    assert fast.iterations < 0.6 * slow.iterations
    plans = [jnp.exp((s.f[:, None] + s.g - cost) / 0.5) / 1600 for s in (slow, fast)]
    assert np.abs(plans[0] - plans[1]).max() < 1e-7
    dual = float(fast.f.mean() + fast.g.mean())  # between the two laws' costs
    assert transport(x, y).cost < dual + 0.5 * np.log(40) + 1e-6


def test_a_plan_that_is_not_reached_says_so():
    x, y = (jnp.asarray(a) for a in two_clouds(30))
    short = EntropicOT(0.01, max_iterations=3).plan(x, y)
    assert not short.converged and short.error > 0.01
    good = EntropicOT(0.5).plan(x, y)
    rows = np.abs(good.matrix.sum(1) - 1 / 30).sum()
    assert good.converged and abs(rows - good.error) < 1e-12
    assert np.abs(good.matrix.sum(0) - 1 / 30).max() < 1e-15


# -- plans of a batch ------------------------------------------------------------------


def test_the_matching_is_the_cheapest_of_all_permutations():
    x, y = two_clouds(12)
    out = compiled(ExactOT(points=6))(KEY, jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_array_equal(out.x0, x)
    for rows in (slice(0, 6), slice(6, 12)):
        cost = square(x[rows], y[rows])
        least = min(cost[range(6), p].sum() for p in itertools.permutations(range(6)))
        found = ((x[rows] - np.asarray(out.x1)[rows]) ** 2).sum()
        assert abs(found - least) < 1e-5 * least
    whole = ExactOT(points=None)(KEY, jnp.asarray(x), jnp.asarray(y))
    assert abs(((whole.x0 - whole.x1) ** 2).sum(1).mean() - w2(x, y) ** 2) < 1e-5


def test_draws_follow_the_rows_of_the_plan():
    x, y = (jnp.asarray(a) for a in two_clouds(6))
    plan = EntropicOT(4.0)
    matrix, n = np.asarray(plan.plan(x, y).matrix), 4000
    run = jax.jit(jax.vmap(lambda key: plan(key, x, y).x1))
    x1 = np.asarray(run(jax.random.split(KEY, n)))
    which = np.abs(x1[:, :, None] - np.asarray(y)).max(-1).argmin(-1)
    counts = np.stack([(which == j).mean(0) for j in range(6)], axis=1)
    exact = matrix / matrix.sum(1, keepdims=True)
    assert (np.abs(counts - exact) < 5 * np.sqrt(exact * (1 - exact) / n) + 1e-3).all()


def test_the_limits_of_the_regularisation():
    x, y = (jnp.asarray(a) for a in two_clouds(64))
    cost = lambda plan: ((x - plan(KEY, x, y).x1) ** 2).sum(1).mean()  # noqa: E731
    sharp = EntropicOT(1e-3, max_iterations=20_000)
    assert abs(cost(sharp) - w2(x, y) ** 2) < 0.02
    assert abs(cost(EntropicOT(1e6)) - square(x, y).mean()) < 3


@pytest.mark.parametrize("spec", ["data:8", "data:2,fsdp:4"])
@pytest.mark.parametrize("points", [None, 8])
def test_one_plan_over_all_devices_is_that_of_one(spec, points):
    mesh = make_mesh(spec)
    x, y = (jnp.asarray(a) for a in two_clouds(64))
    label = jnp.arange(64) % 2
    plan = EntropicOT(1.0, points=points)
    axes = mesh.axis_names

    def part(x, y, label):
        out = plan(KEY, x, y, label, axis_name=axes)
        return out.x1, jax.lax.pmean(out.aux["coupling_error"], axes)

    spread = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(P(axes),) * 3,
        out_specs=(P(axes), P()),
        check_vma=False,
    )
    x1, error = jax.jit(spread)(x, y, label)
    one = compiled(plan)(KEY, x, y, label)
    np.testing.assert_array_equal(x1, one.x1)
    assert abs(error - one.aux["coupling_error"]) < 1e-12


# -- conditions ------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [ExactOT(), EntropicOT(points=64)])
def test_conditions_keep_the_law_of_the_noise_within_a_class(plan):
    """Without them noise goes to the class it is near to, and sampling is wrong."""
    n = 64 * 40
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, n)
    x0 = jnp.asarray(4.0 * label[:, None] - 2 + 0.3 * rng.normal(size=(n, 1)))
    z = jnp.asarray(rng.normal(size=(n, 1)))
    run = jax.jit(lambda cond: plan(KEY, x0, z, cond).x1)
    aware, plain = (np.asarray(run(c))[:, 0] for c in (jnp.asarray(label), None))
    bars = 4.5 / np.sqrt(n / 2)
    assert all(abs(aware[label == k].mean()) < bars for k in (0, 1))
    assert plain[label == 1].mean() > 0.5 > -0.5 > plain[label == 0].mean()
    # each class is matched: dearer than without, cheaper than not at all
    cost = [np.mean((np.asarray(x0)[:, 0] - x) ** 2) for x in (plain, aware, z[:, 0])]
    assert cost[0] < cost[1] < cost[2]
    hot = jnp.asarray(one_hot(label, 2))
    np.testing.assert_array_equal(run(hot)[:, 0], aware)


def test_the_weight_of_conditions_goes_from_none_to_infinite():
    x, y = (jnp.asarray(a) for a in two_clouds(64))
    angle = jnp.linspace(0.0, 1.0, 64)
    run = lambda w, c: ExactOT(condition_weight=w)(KEY, x, y, c).x1  # noqa: E731
    np.testing.assert_array_equal(run(0.0, angle), run(None, None))
    np.testing.assert_array_equal(run(None, angle), y)  # all differ: with their own
    np.testing.assert_array_equal(run(1e9, angle), y)
    some = run(20.0, angle)
    assert (some != y).any() and (some != run(None, None)).any()


# -- in a loss, in training ------------------------------------------------------------


class Zero(eqx.Module):
    weight: jax.Array = sdegen.number(0.0)

    def __call__(self, t, x, cond):
        return self.weight * x


def test_losses_use_the_pairs_that_are_given():
    x0, x1 = (jnp.asarray(a) for a in two_clouds(32))
    ends = coupling.PairedData(x1, jnp.arange(32))
    interpolant = sdegen.StochasticInterpolant(latent=None)
    model = sdegen.VelocityModel(Zero(), interpolant)
    found = sdegen.velocity_loss(model, KEY, x0, ends, coupling=coupling.paired)
    assert abs(found - jnp.mean((x1 - x0) ** 2)) < 1e-12
    seen = []

    def network(t, x, cond):
        seen.append(cond)
        return 0 * x

    kind = sdegen.prediction.velocity
    denoiser = sdegen.Denoiser(network, sdegen.RectifiedFlow(), kind)
    found = sdegen.denoising_loss(denoiser, KEY, x0, ends, coupling=coupling.paired)
    assert abs(found - jnp.mean((x1 - x0) ** 2)) < 1e-12
    np.testing.assert_array_equal(seen[-1], np.arange(32))  # labels reach the network


def small(loss=sdegen.velocity_loss, **options):
    """A model, and the loss with a coupling, that train in a second."""
    network = nets.MLPConfig(width=8, depth=1)((2,), jax.random.key(1))
    model = sdegen.VelocityModel(network, sdegen.StochasticInterpolant(latent=None))
    return model, eqx.Partial(loss, **options)


def rows_of(tmp_path, plan, steps=6, **options):
    model, loss = small(coupling=plan)
    data = two_clouds(512)[0].astype(np.float32)
    with sdegen.Recorder(tmp_path, {}) as recorder:
        done = sdegen.fit(
            model,
            data,
            steps=steps,
            batch_size=64,
            loss=loss,
            steps_per_call=3,
            recorder=recorder,
            progress=False,
            **options,
        )
    text = (tmp_path / "rows.jsonl").read_text().splitlines()
    return done, [eval(line, {"null": None}) for line in text]


@pytest.mark.parametrize("plan", [ExactOT(points=8), EntropicOT(points=8)])
def test_training_with_plans_is_the_same_on_a_mesh(plan, tmp_path, float32):
    one, rows = rows_of(tmp_path / "one", plan)
    many, spread = rows_of(tmp_path / "many", plan, mesh=make_mesh("data:8"))
    np.testing.assert_allclose(one.losses, many.losses, rtol=2e-4)
    assert rows[0]["coupling_unsolved"] == spread[0]["coupling_unsolved"] == 0
    other, _ = rows_of(tmp_path / "other", coupling.independent)
    assert one.losses.mean() < 0.8 * other.losses.mean()


def test_training_tells_of_plans_that_were_not_reached(tmp_path, float32):
    plan = EntropicOT(1e-3, max_iterations=2)
    with pytest.warns(UserWarning, match="100.0% of the plans of the coupling did not"):
        _, rows = rows_of(tmp_path / "short", plan, accumulate=2)
    assert rows[-1]["coupling_unsolved"] == 1 and rows[-1]["coupling_error"] > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rows_of(tmp_path / "good", EntropicOT(points=16))


def test_an_infinite_sample_stops_the_training_and_nothing_else(float32):
    """Costs that are not finite never raise on the device."""
    x, y = (jnp.asarray(a, jnp.float32) for a in two_clouds(16))
    bad = x.at[3, 0].set(jnp.nan)
    exact = compiled(ExactOT(points=8))(KEY, bad, y)
    np.testing.assert_array_equal(exact.x1[:8], y[:8])  # as they came
    assert exact.aux["coupling_unsolved"] == 0.5
    entropic = compiled(EntropicOT())(KEY, bad, y)
    assert np.isnan(entropic.x1).all() and entropic.aux["coupling_unsolved"] == 1


DEADLOCK = """
import jax, jax.numpy as jnp
from sdegen.losses.coupling import ExactOT
def run(key):
    def body(total, k):
        x, y = jax.random.normal(k, (2, 512, 2))
        return total + ExactOT(points=128)(k, x, y).x1.sum(), None
    return jax.lax.scan(body, 0.0, jax.random.split(key, 3))[0]
keys = jax.random.split(jax.random.key(0), 4)
print(bool(jnp.isfinite(jax.jit(jax.vmap(run))(keys)).all()))
"""


def test_the_host_is_asked_from_a_pool_of_one_thread():
    out = subprocess.run(
        [sys.executable, "-c", DEADLOCK],
        env={**os.environ, "NPROC": "1", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.stdout.strip() == "True", out.stderr


# -- mistakes --------------------------------------------------------------------------

X = jnp.ones((8, 2))


def shuffled(key, x0, x1):
    return x0[::-1], x1


def moved(key, x0, x1, cond):
    return Pairs(x0[::-1], x1, cond[::-1])


def loss_with(plan, cond=None):
    model, loss = small(coupling=plan)
    return loss(model, KEY, X, cond)


REFUSED = {
    r"x0 of shape \(8, 2\) and x1 of shape \(4, 2\)": lambda: coupling.couple(
        coupling.independent, KEY, X, X[:4]
    ),
    "costs between x0 and x1 hold NaN": lambda: ExactOT()(KEY, X * jnp.nan, X),
    "hold NaN or infinity": lambda: EntropicOT()(KEY, X, X.at[0].set(jnp.inf)),
    "shuffled drops the labels": lambda: loss_with(shuffled, jnp.arange(8)),
    "not made of plans of 3 points. Take points=2": lambda: ExactOT(3)(KEY, X, X),
    r"pass cond=coupling.PairedData\(x1\)": lambda: loss_with(coupling.paired, X),
    "must keep the shape": lambda: loss_with(lambda key, x0, x1: (x0, x1[:, :1])),
    r"must return \(x0, x1\), or Pairs, got": lambda: loss_with(lambda key, x0, x1: x0),
    "regularisation must be > 0": lambda: EntropicOT(0.0),
    "a plan needs points >= 1": lambda: ExactOT(points=0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_mistakes_are_answered_with_a_sentence(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_a_coupling_may_move_the_conditions_along():
    out = coupling.couple(moved, KEY, X, X, jnp.arange(8))
    np.testing.assert_array_equal(out.cond, np.arange(8)[::-1])
    assert coupling.couple(shuffled, KEY, X, X).cond is None


def test_a_sweep_tells_of_plans_that_were_not_reached(float32):
    data = two_clouds(256)[0].astype(np.float32)

    def trial(key, rate):
        model, loss = small(coupling=EntropicOT(1e-3, max_iterations=2))
        optimizer = sdegen.AdamW(learning_rate=rate)
        return sdegen.Training(
            model, data, steps=4, batch_size=64, loss=loss, optimizer=optimizer
        )

    with pytest.warns(UserWarning, match="100.0% of the plans of the coupling did not"):
        sdegen.sweep(trial, {"rate": [1e-3, 1e-2]}, metric="loss", progress=False)


@pytest.mark.parametrize(
    "n, shape", [(0, (0, 2)), (4, (0, 2)), (4, (4, 3)), (4, (6, 2))]
)
def test_ends_that_cannot_be_paired_get_a_sentence(n, shape):
    """By what all plans share: the arguments of a call are typed in these tests."""
    with pytest.raises(ValueError, match="points of one shape|as many x1 as"):
        plans(jnp.ones((n, 2)), jnp.ones(shape), None, None, None)
    if shape != (6, 2):  # a plan may be between sets of two sizes
        with pytest.raises(ValueError, match="points of one shape"):
            cost_matrix(jnp.ones((n, 2)), jnp.ones(shape))
