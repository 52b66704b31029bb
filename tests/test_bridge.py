"""Schroedinger bridges: exact Gaussian drifts, both directions, fitting, few steps."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdegen
from sdegen import coupling, nets
from sdegen.solvers import PinnedEuler

KEY = jax.random.key(0)
S0, S1, EPS = 1.0, 2.0, 0.5
C = 1.7655644371
"""The covariance of the ends of the bridge from N(0, 1) to N(0, 4), sigma^2 = EPS."""


class Drift(eqx.Module):
    """The exact drift of a bridge mixture of two centred Gaussians of covariance c."""

    c: jax.Array = eqx.field(converter=jnp.asarray)
    up: bool = False

    def __call__(self, t, x, cond):
        t = t.reshape(-1, *[1] * (x.ndim - 1))
        var = (1 - t) ** 2 * S0**2 + t**2 * S1**2
        var = var + 2 * t * (1 - t) * self.c + EPS * t * (1 - t)
        x0 = (1 - t) * S0**2 + t * self.c  # Cov(x0, x_t)
        x1 = (1 - t) * self.c + t * S1**2
        if self.up:  # E[x1 - x0 - sigma sqrt(t / (1 - t)) z]
            return (x1 - x0 - EPS * t) / var * x
        return (x0 - x1 - EPS * (1 - t)) / var * x


def bridge(c=C):
    nets = Drift(c), Drift(c, up=True)
    return sdegen.SchroedingerBridge(*nets, jnp.sqrt(EPS))


def moved(model, start, strength):
    """(variance of the end, covariance with the start), of the linear equation."""
    process = model.backward(strength)
    drift = process.drift if strength is not None else process

    def rhs(s, y, args):
        var, cov = y
        slope = drift(s, jnp.ones(1))[0]
        noise = process.diffusion(s, jnp.ones(1)) if strength is not None else 0.0
        return 2 * slope * var + noise**2, slope * cov

    out = diffrax.diffeqsolve(
        diffrax.ODETerm(rhs),
        diffrax.Dopri8(),
        0.0,
        1.0,
        0.01,
        (jnp.asarray(start**2), jnp.asarray(start**2)),
        stepsize_controller=diffrax.PIDController(rtol=1e-11, atol=1e-11),
    )
    return [float(y[-1]) for y in out.ys]


def upward(model):
    return sdegen.Forward(model, sdegen.Gaussian())


@pytest.mark.parametrize("strength", [None, 0.6, 1.0, 1.7])
def test_any_noise_moves_one_law_to_the_other_both_ways(strength):
    strength = None if strength is None else jnp.asarray(strength)
    down = moved(bridge(), S1, strength)
    up = moved(upward(bridge()), S0, strength)
    assert abs(down[0] - S0**2) < 1e-9 and abs(up[0] - S1**2) < 1e-9
    assert abs(down[1] - up[1]) < 1e-9  # the same joint law of the ends
    if strength is not None and strength == 1:
        assert abs(down[1] - C) < 1e-9  # the bridge keeps its own coupling
    if strength is None:
        assert abs(down[1] - S0 * S1) < 1e-9  # the monotone map


def test_markovian_fitting_finds_the_bridge():
    """The coupling of each round is that of the process learned on the last one."""
    c, found = 0.0, []
    for k in range(12):
        model = bridge(c)
        mover, start = (upward(model), S0) if k % 2 else (model, S1)
        var, c = moved(mover, start, jnp.asarray(1.0))
        assert abs(var - (S1 if k % 2 else S0) ** 2) < 1e-9  # marginals stay exact
        found.append(abs(c - C))
    print(found)
    assert found[0] > 0.05 and found[-1] < 1e-8
    assert all(b < 0.5 * a for a, b in zip(found, found[1:], strict=False) if b > 1e-9)


def test_the_golden_covariance_is_that_of_the_entropic_plan():
    assert abs(C - (-EPS + np.sqrt(EPS**2 + 4 * S0**2 * S1**2)) / 2) < 1e-10


def test_velocity_and_score_are_those_of_the_law():
    model, t, x = bridge(), jnp.asarray([0.3]), jnp.asarray([[0.7]])

    def var(t):
        mix = (1 - t) ** 2 * S0**2 + t**2 * S1**2 + 2 * t * (1 - t) * C
        return mix + EPS * t * (1 - t)

    score = -x / var(t)
    speed = jax.grad(lambda t: var(t))(t[0]) / 2 / var(t[0])
    assert np.abs(model.score(t, x) - score).max() < 1e-12
    assert np.abs(model.velocity(t, x) - speed * x).max() < 1e-12


class Affine(eqx.Module):
    a: jax.Array = sdegen.number(0.0)

    def __call__(self, t, x, cond):
        return self.a * x


class At(sdegen.times.AbstractTimes):
    time: jax.Array = eqx.field(converter=jnp.asarray)
    stratified: bool = True

    def quantile(self, path, u):
        return self.time + 0 * u


@pytest.mark.parametrize("t", [1e-3, 0.3, 0.9])
def test_the_loss_regresses_on_both_drifts(t):
    """The best slopes at one time are those of the closed form, up to the ends."""
    n, runs = 20_000, 16
    flat, build = jax.flatten_util.ravel_pytree((Affine(), Affine()))

    def given(key, x0, x1, cond=None):  # the Gaussian coupling of covariance C
        return x0, C * x0 + jnp.sqrt(S1**2 - C**2) * x1

    @jax.jit
    def best(key):
        x0 = jax.random.normal(key, (n, 1))

        def loss(p):
            model = sdegen.SchroedingerBridge(*build(p), jnp.sqrt(EPS))
            return sdegen.bridge_loss(model, key, x0, coupling=given, times=At(t))

        return -jnp.linalg.solve(jax.hessian(loss)(flat), jax.grad(loss)(flat))

    found = np.stack([best(jax.random.key(i)) for i in range(runs)])
    one = jnp.ones((1, 1))
    exact = [float(net(jnp.asarray([t]), one, None)[0, 0]) for net in bridge().trained]
    bars = 4 * found.std(0, ddof=1) / np.sqrt(runs)
    print(found.mean(0), exact, bars)
    assert (np.abs(found.mean(0) - exact) < bars).all() and (bars < 0.05).all()


def test_one_network_is_called_where_one_is_enough():
    calls = []

    class Counted(eqx.Module):
        name: str = eqx.field(static=True)

        def __call__(self, t, x, cond):
            jax.debug.callback(lambda: calls.append(self.name))
            return 0 * x

    model = sdegen.SchroedingerBridge(Counted("down"), Counted("up"))
    for strength, expected in ((1.0, {"down"}), (0.5, {"down", "up"})):
        calls.clear()
        out = sdegen.sample(KEY, model, (4, 1), grid=3, stochasticity=strength)
        jax.block_until_ready(out.x)
        jax.effects_barrier()
        assert set(calls) == expected and out.evaluations == 3


def test_steps_that_are_pinned_to_the_data():
    """Exact for a point in any number of steps; else the error is like h log(1 / h)."""

    def to_point(t, x, cond):  # E[(x0 - x_t) / t] for data at 2
        return (2.0 - x) / t[:, None]

    model = sdegen.SchroedingerBridge(to_point, Affine(), 0.8)
    for steps in (1, 3):
        out = sdegen.sample(KEY, model, (64, 1), grid=steps, stochasticity=1.0)
        assert np.abs(out.x - 2).max() < 1e-12
        plain = diffrax.Euler()
        out = sdegen.sample(
            KEY, model, (64, 1), grid=steps, stochasticity=1.0, solver=plain
        )
        assert np.std(out.x) > 0.2  # the noise of the last step
    errors = []
    for steps in (20, 40, 80):
        s = np.arange(steps + 1) / steps
        var = S1**2  # the recursion of the variance, exactly
        for a, b in zip(s[:-1], s[1:], strict=True):
            slope = float(Drift(C)(jnp.asarray([1 - a]), jnp.ones((1, 1)), None)[0, 0])
            var = (1 + slope * (b - a)) ** 2 * var + EPS * (b - a) * (1 - b) / (1 - a)
        errors.append(abs(var - S0**2))
    print(errors)
    h = 1 / np.array([20, 40, 80])
    slopes = np.diff(np.log(errors)) / np.diff(np.log(h * np.log(1 / h)))
    assert (np.abs(slopes - 1) < 0.2).all()
    n, steps = 40_000, 20
    out = sdegen.sample(
        KEY,
        bridge(),
        (n, 1),
        start=S1 * jax.random.normal(KEY, (n, 1)),
        grid=steps,
        stochasticity=1.0,
    )
    assert abs(abs(np.var(out.x) - S0**2) - errors[0]) < 5 * np.sqrt(2 / n)
    flow = sdegen.sample(KEY, bridge(), (3, 1), grid=7, solver=PinnedEuler())
    euler = sdegen.sample(KEY, bridge(), (3, 1), grid=7, solver=diffrax.Euler())
    np.testing.assert_allclose(flow.x, euler.x, rtol=1e-12)


def test_the_way_up_undoes_the_way_down():
    x1 = jnp.linspace(-2.0, 2.0, 9)[:, None]
    tight = {"solver": diffrax.Dopri8(), "grid": sdegen.Adaptive(1e-11, 1e-11)}
    down = sdegen.sample(KEY, bridge(), (9, 1), start=x1, **tight)
    np.testing.assert_allclose(down.x, x1 * S0 / S1, atol=1e-9)
    back = sdegen.sample(KEY, upward(bridge()), (9, 1), start=down.x, **tight)
    np.testing.assert_allclose(back.x, x1, atol=1e-9)


@pytest.mark.slow
def test_both_ways_to_train_a_bridge(well_compiled, float32):
    """Minibatch plans, and two rounds of fitting that start from no coupling."""
    rng = np.random.default_rng(0)
    x0, x1 = (rng.normal(size=(8192, 1)).astype(np.float32) * s for s in (S0, S1))

    def model():
        pair = [
            nets.MLPConfig(width=16, depth=1)((1,), jax.random.key(i)) for i in range(2)
        ]
        base = sdegen.Empirical(x1)
        return sdegen.SchroedingerBridge(*pair, np.sqrt(EPS), base)

    options = {
        "both_ways": True,
        "steps": 800,
        "batch_size": 256,
        "n": 8192,
        "pairs": {"grid": 30, "stochasticity": 1.0},
        "steps_per_call": 200,
        "optimizer": sdegen.AdamW(learning_rate=1e-2),
        "progress": False,
    }
    plan = eqx.Partial(sdegen.bridge_loss, coupling=coupling.EntropicOT(2 * EPS))
    (batch,) = sdegen.rectify(KEY, model(), x0, rounds=1, loss=plan, **options)
    *_, fitted = sdegen.rectify(KEY, model(), x0, rounds=3, **options)
    for found in (batch.pairs, fitted.pairs):
        cov = np.cov(found.x0[:, 0], found.x1[:, 0])
        print(cov)
        assert abs(cov[0, 1] - C) < 0.12  # independent ends: 0
        assert abs(cov[0, 0] - S0**2) < 0.1 and abs(cov[1, 1] - S1**2) < 0.4


REFUSED = {
    "one row per sample|at least one axis per sample": lambda: sdegen.bridge_loss(
        bridge(), KEY, jnp.zeros(4)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_mistakes_are_answered_with_a_sentence(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
