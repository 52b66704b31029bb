"""SDEs without a path: targets by simulation, three losses, and the way back.

Oracles: Stein's identity, E[T phi(x)] = -E[phi'(x)], which holds for a target T of the
score of any law; the moments of an Ornstein-Uhlenbeck chain; and, on the line, the
Fokker-Planck equation solved on a grid, which knows the score of a double well.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracle import G1
from test_mesh import COLLECTIVES, in_the_loop

import sdegen
from sdegen import nets
from sdegen.checks.fokker_planck import solve as grid_law
from sdegen.checks.test_data import Mixture
from sdegen.losses.simulated_paths import best_weights, chain, square_clock, targets
from sdegen.mesh import batch_sharding, data_mesh, replicated

LOSSES = {
    "simulated": sdegen.simulated_score_loss,
    "implicit": sdegen.implicit_score_loss,
    "sliced": sdegen.sliced_score_loss,
}


class Affine(eqx.Module):
    """a x + b, with other numbers after each of two steps."""

    a: jax.Array
    b: jax.Array

    def __call__(self, t, x, cond):
        i = (t > -0.1).astype(int)[:, None]
        return self.a[i] * x + self.b[i]


def affine():
    return Affine(jnp.zeros(2), jnp.zeros(2))


def coupled():
    """Nonlinear, not symmetric, with noise that depends on the state."""

    def drift(t, x, p):
        return jnp.stack([2 * x[1] - x[0] ** 3 / 4, -x[1] - jnp.sin(2 * x[0]) * x[1]])

    return sdegen.CustomSDE(
        drift, lambda t, x, p: 1 + p * jnp.sin(x) ** 2, 0.5, t_max=0.5
    )


def test_targets_obey_steins_identity_for_any_weights():
    sde, n, steps = coupled(), 10_000, 16
    ts = square_clock(sde, steps)
    ramp = jnp.linspace(1.0, 0.2, steps)[:, None] * jnp.array([1.0, 0.5])

    @jax.jit
    def gaps(key):
        x0 = 0.5 + 0.3 * jax.random.normal(key, (n, 2))
        xs = chain(sde, jax.random.split(key, n), x0, ts)
        weights = {
            "local": None,
            "best": best_weights(sde, ts, xs[:, :1000]),
            "any": ramp.at[0].set(1.0),
        }
        xs, out, sizes = xs[:, 1000:], {}, {}
        for case, weight in weights.items():
            found = targets(sde, ts, xs, weight)
            sizes[case] = jnp.mean(found[-1] ** 2)
            for phi in (jnp.sin, jnp.positive, lambda x: jnp.cos(2 * x)):
                values, slopes = jax.jvp(phi, (xs[1:],), (jnp.ones_like(xs[1:]),))
                gap = found * values + slopes
                across = found * values[..., ::-1]  # E[T_i phi(x_j)] = 0
                out[case, phi] = gap.mean(1), gap.std(1), across.mean(1), across.std(1)
        return list(out.values()), sizes

    found, sizes = gaps(jax.random.key(1))
    for mean, std, across, across_std in found:
        # 9 x 16 steps x 2 coordinates x 2: 4.7 standard errors
        assert (abs(mean) < 4.7 * std / np.sqrt(n - 1000)).all()
        assert (abs(across) < 4.7 * across_std / np.sqrt(n - 1000)).all()
    assert sizes["best"] < 0.5 * sizes["local"]  # and the variance is why


def ornstein_uhlenbeck(**ends):
    def drift(t, x, p):
        return -x

    return sdegen.CustomSDE(drift, lambda t, x, p: jnp.sqrt(2.0), **ends)


def chain_moments(ts, mean=1.0, variance=0.25):
    """Mean, variance and variance given x_0 after every step."""
    rows = []
    noise = 0.0
    for h in np.diff(ts):
        mean, variance = mean * (1 - h), variance * (1 - h) ** 2 + 2 * h
        noise = noise * (1 - h) ** 2 + 2 * h
        rows.append((mean, variance, noise))
    return np.array(rows).T


def gaussian_data(n=50_000):
    return 1.0 + 0.5 * jax.random.normal(jax.random.key(5), (n, 1))


@functools.cache
def two_steps():
    """An OU model of two steps, whose chain is Gaussian exactly."""
    return sdegen.ScoreModel.from_data(
        affine(),
        ornstein_uhlenbeck(t_max=0.2),
        gaussian_data(),
        jax.random.key(0),
        steps=2,
        prior=sdegen.SimulatedPrior(ornstein_uhlenbeck(t_max=0.2), gaussian_data(), 2),
    )


def test_the_scales_are_the_moments_of_the_process():
    model = two_steps()
    mean, variance, noise = chain_moments(model.clock)
    error = np.sqrt(variance / 1024)
    assert (abs(model.mean[1:, 0] - mean) < 5 * error).all()
    np.testing.assert_allclose(model.std[1:, 0] ** 2, variance, rtol=5 * 0.045)
    np.testing.assert_allclose(model.noise[1:, 0] ** 2, noise, rtol=5 * 0.045)
    # between the points of the table linear in sqrt(t), before the first as at it
    half = model.scales(0.2 * 0.75**2)
    np.testing.assert_allclose(half[0], np.log(0.75) / 2)
    np.testing.assert_allclose(half[3], (model.noise[1] + model.noise[2]) / 2)
    for early in (0.0, 0.02):
        np.testing.assert_allclose(model.scales(early)[3], model.noise[1])


@pytest.mark.parametrize("name", LOSSES)
def test_the_minimiser_of_every_loss_is_the_score(name):
    """U5: an affine score, fitted on 400,000 paths, has slope -1 / variance."""
    model, loss = two_steps(), LOSSES[name]

    @jax.jit
    def minimiser(key):
        data_key, key = jax.random.split(key)
        x0 = 1.0 + 0.5 * jax.random.normal(data_key, (20_000, 1))

        def value(v):
            own = eqx.tree_at(lambda m: m.network, model, Affine(v[:2], v[2:]))
            return loss(own, key, x0, draws=2)

        zero = jnp.zeros(4)
        v = -jnp.linalg.solve(jax.hessian(value)(zero), jax.grad(value)(zero))
        spread, noise = model.std[1:, 0], model.noise[1:, 0]
        slope = v[:2] / (noise * spread) - 1 / spread**2
        return slope, model.mean[1:, 0] - v[2:] / noise / slope  # and the root

    slopes, roots = map(
        np.asarray, zip(*(minimiser(jax.random.key(i)) for i in range(20)), strict=True)
    )
    mean, variance, _ = chain_moments(model.clock)
    for found, exact in ((slopes, -1 / variance), (roots, mean)):
        error = found.std(0, ddof=1) / np.sqrt(20)
        assert (abs(found.mean(0) - exact) < 4 * error).all(), (found.mean(0), exact)
        assert (error < 0.02).all()


# -- the double well -------------------------------------------------------------------


def well(t_max=1.0):
    """dx = (x - x^3) dt + sqrt(2 kT) dw with kT = 1/2."""

    def drift(t, x, p):
        return x - x**3

    return sdegen.CustomSDE(drift, lambda t, x, p: jnp.sqrt(2 * p), 0.5, t_max=t_max)


@functools.cache
def law_of_the_well():
    start = Mixture(*(jnp.asarray(v) for v in (G1.w, G1.mu, G1.s)))
    return grid_law(well(), start, np.linspace(0.0, 1.0, 301), 8.0)


def distance(x):
    """The largest difference of distribution functions to G1, in 1 / sqrt(n)."""
    u = np.sort(np.asarray(G1.cdf(x[:, 0])))
    n = len(u)
    return max((np.arange(1, n + 1) / n - u).max(), (u - np.arange(n) / n).max())


def test_the_exact_score_brings_the_data_back():
    law, n = law_of_the_well(), 4000
    q = jax.random.uniform(jax.random.key(0), (n,))
    start = law.cdf(300).quantile(q)[:, None]
    back = sdegen.reverse(well(), law)
    out = sdegen.simulate(jax.random.key(1), back, start, grid=300)
    assert distance(out.x) < 1.95 / np.sqrt(n) + 0.01  # 0.1 %, and Euler's bias
    assert distance(start) > 0.05


@functools.cache
def trained_well():
    data = G1.sample(jax.random.key(3), 8000)[:, None].astype(jnp.float32)
    with jax.enable_x64(False):
        data, sde = jnp.asarray(data), well()
        model = sdegen.ScoreModel.from_data(
            nets.MLPConfig(width=32, depth=1)((1,), jax.random.key(0)),
            sde,
            data,
            jax.random.key(1),
            steps=60,
            prior=sdegen.SimulatedPrior(sde, data, 60),
        )
        fit = sdegen.fit(
            model,
            data,
            steps=600,
            batch_size=128,
            loss=sdegen.simulated_score_loss,
            optimizer=sdegen.AdamW(learning_rate=5e-3),
            ema=0.99,
            progress=False,
        )
        out = sdegen.sample(jax.random.key(4), fit.model, (4000, 1), stochasticity=1.0)
        assert fit.losses.dtype == out.x.dtype == jnp.float32
        return fit.model, out


def test_a_trained_score_is_near_that_of_the_fokker_planck_equation():
    (model, _), law = trained_well(), law_of_the_well()
    for i in (15, 75, 225):
        t, p = law.ts[i], law.mass(i)
        with jax.enable_x64(False):
            x = jnp.asarray(np.asarray(law.x), jnp.float32)[:, None]
            found = np.asarray(model.score(jnp.float32(t), x)[:, 0])
            sigma = float(model.scales(jnp.float32(t))[3][0])
        exact = np.asarray(law.scores[i])
        error, size = (
            sigma * np.sqrt(p @ (found - exact) ** 2),
            sigma * np.sqrt(p @ exact**2),
        )
        assert error < 0.2 and error < 0.25 * size, (float(t), error, size)


def test_samples_of_a_trained_score_have_the_law_of_the_data():
    _, out = trained_well()
    assert int(out.evaluations) == 200
    assert bool(out.ok.all())  # though x^3 explodes when time runs backwards
    assert distance(np.asarray(out.x, float)) < 1.95 / np.sqrt(4000) + 0.03


def test_the_stationary_law_is_boltzmanns():
    # exp(-U / kT), U = x^4/4 - x^2/2: its score is drift / kT, and simulation keeps it
    x = np.linspace(-4, 4, 4001)
    p = np.exp(-(x**4 / 4 - x**2 / 2) / 0.5)
    p /= p.sum()
    q = (np.arange(4000) + 0.5) / 4000
    start = jnp.asarray(np.interp(q, p.cumsum(), x))[:, None]
    out = sdegen.simulate(jax.random.key(0), well(), start, grid=500)
    moments = np.array([p @ x**2, p @ x**4])
    found = np.stack([np.asarray(out.x[:, 0]) ** k for k in (2, 4)])
    error = found.std(1) / np.sqrt(4000)
    assert (abs(found.mean(1) - moments) < 4 * error + 0.005).all()


# -- devices ---------------------------------------------------------------------------


def test_a_batch_on_eight_devices_gives_the_loss_of_one():
    mesh, model, x0 = data_mesh(), two_steps(), gaussian_data(64)
    loss = functools.partial(sdegen.simulated_score_loss, draws=2)
    key = jax.random.key(7)
    one = jax.jit(loss)(model, key, x0)

    def part(model, key, x0):
        return jax.lax.pmean(loss(model, key, x0, axis_name="data"), "data")

    specs = {"in_specs": (P(), P(), P("data")), "out_specs": P()}
    many = jax.jit(jax.shard_map(part, mesh=mesh, check_vma=False, **specs))
    np.testing.assert_allclose(many(model, key, x0), one, rtol=1e-12)
    # and by the compiler: as `fit` does it, without a collective in the simulation
    placed = (
        jax.device_put(model, replicated(mesh)),
        jax.device_put(key, replicated(mesh)),
        jax.device_put(x0, batch_sharding(mesh)),
    )
    compiled = jax.jit(loss).lower(*placed).compile()
    np.testing.assert_allclose(compiled(*placed), one, rtol=1e-12)
    text = compiled.as_text()
    assert "all-reduce" in text  # of the mean
    assert not any(word in in_the_loop(text) for word in COLLECTIVES)


# -- words -----------------------------------------------------------------------------


def test_what_cannot_work_is_refused_with_a_sentence():
    make = functools.partial(sdegen.ScoreModel.from_data, affine(), steps=2)
    key, data = jax.random.key(0), gaussian_data(100)
    far = ornstein_uhlenbeck(t_max=0.1)
    with pytest.raises(ValueError, match="SimulatedPrior"):
        make(far, data, key)
    with pytest.raises(ValueError, match="pathwise=False"):
        make(far, jnp.ones((10, 33)), key)
    with pytest.raises(ValueError, match="at least two axes"):
        make(far, jnp.ones(10), key)
    silent = sdegen.CustomSDE(lambda t, x, p: -x, lambda t, x, p: 0.0)
    with pytest.raises(ValueError, match="noise in every coordinate"):
        make(silent, data, key)
    with pytest.raises(ValueError, match="draws must be 1 to 2"):
        sdegen.simulated_score_loss(two_steps(), key, data)
    wide = eqx.tree_at(lambda m: m.network, two_steps(), lambda t, x, c: t)
    with pytest.raises(ValueError, match="shape of x"):
        wide.score(jnp.asarray(0.1), data)
