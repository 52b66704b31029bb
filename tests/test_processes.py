"""The linear processes: one law x_t = alpha x0 + sigma z, three ways of knowing it.

alpha and sigma must agree with the published f and g^2, with the moment equations of f
and g integrated here by collocation, and with a cloud of simulated paths. Then: the
inverse of the log-SNR, its derivatives, the grids, vmap, retracing, float32, refusals.
"""

import contextlib
import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import G1, PROCESSES, process

import sdegen
from sdegen.typing import Scalar, number

BETA_MIN, BETA_MAX = 0.1, 20.0


def span(path, low=0.0, high=1.0, n=99):
    """Times at equal fractions of the range, never t_min or t_max by default."""
    a, b = float(path.t_min), float(path.t_max)
    return a + (b - a) * np.linspace(low, high, n)


@functools.cache
def single(name):
    """The default object of a process in float32; call it inside `precision`."""
    return PROCESSES[name]()


@contextlib.contextmanager
def precision(name, dtype):
    """The default object in `dtype`, with JAX in the precision that goes with it."""
    with jax.enable_x64(dtype == "float64"):
        yield process(name) if dtype == "float64" else single(name)


class Laws(NamedTuple):
    """What a process says about a set of times."""

    alpha: np.ndarray
    sigma: np.ndarray
    f: np.ndarray
    g2: np.ndarray
    logsnr: np.ndarray
    tau: np.ndarray


_ROOM = 4000  # every query is padded to one size, so that a process compiles once


@eqx.filter_jit
def _laws(path, ts):
    def at(t):
        f, g = path.drift(t, jnp.ones_like(t)), path.diffusion(t, jnp.ones_like(t))
        ratio = path.logsnr(t), path.flow_time(t)
        return Laws(path.alpha(t), path.sigma(t), f, g**2, *ratio)

    return jax.vmap(at)(ts)


def laws(path, ts):
    """alpha, sigma, f, g^2, the log-SNR and the flow time at `ts`, in its dtype."""
    room = np.pad(np.asarray(ts), (0, _ROOM - len(ts)), mode="edge")
    return Laws(*(np.asarray(a)[: len(ts)] for a in _laws(path, room)))


@eqx.filter_jit
def _times(path, logsnrs):
    return jax.vmap(jax.value_and_grad(path.time))(logsnrs)


def times(path, logsnrs):
    """The times of `logsnrs` and their derivatives."""
    room = np.pad(np.asarray(logsnrs), (0, 100 - len(logsnrs)), mode="edge")
    return [np.asarray(a)[: len(logsnrs)] for a in _times(path, room)]


# -- A1(a): the table of published coefficients ----------------------------------------


def vp_table(t):
    beta = BETA_MIN + (BETA_MAX - BETA_MIN) * t
    return -beta / 2, beta


def subvp_table(t):
    beta = BETA_MIN + (BETA_MAX - BETA_MIN) * t
    big_b = BETA_MIN * t + (BETA_MAX - BETA_MIN) * t**2 / 2
    return -beta / 2, -beta * np.expm1(-2 * big_b)


def ve_table(t):
    variance = 0.01**2 * (50.0 / 0.01) ** (2 * t)
    return 0 * t, 2 * np.log(50.0 / 0.01) * variance


def flow_table(sigma_min):
    def table(t):
        # d(sigma^2)/dt - 2 f sigma^2 with sigma' = 1 - sigma_min and f = -1/(1 - t)
        # collapses to 2 sigma / (1 - t).
        return -1 / (1 - t), 2 * (sigma_min + (1 - sigma_min) * t) / (1 - t)

    return table


def learned_table(t):
    # alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma): f = -gamma' sigma^2 / 2 and
    # g^2 = gamma' sigma^2; gamma' by the definition, differentiated by hand.
    gamma = sdegen.Gamma()
    a, b = (np.log1p(np.exp(np.asarray(v))) for v in (gamma.heights, gamma.slopes))
    c, (low, high) = np.asarray(gamma.places), np.asarray(gamma.ends)

    def wave(u):
        return 1 / (1 + np.exp(-b * (np.asarray(u)[..., None] - c)))

    whole = 1 + ((wave(1.0) - wave(0.0)) * a).sum(-1)
    rise = t + ((wave(t) - wave(0.0)) * a).sum(-1)
    slope = (high - low) * (1 + (a * b * wave(t) * (1 - wave(t))).sum(-1)) / whole
    variance = 1 / (1 + np.exp(-(low + (high - low) * rise / whole)))
    return -slope * variance / 2, slope * variance


def ddpm_table(t):
    # Inside step i alpha_bar decays at the constant rate T log(1 - beta_i), and
    # alpha^2 + sigma^2 stays 1: f is half that rate and g^2 = -2 f.
    betas = np.linspace(1e-4, 0.02, 1000)
    rate = 1000 * np.log1p(-betas[np.floor(t * 1000).astype(int)])
    return rate / 2, -rate


TABLE = {
    "VP": (sdegen.VP, vp_table),
    "SubVP": (sdegen.SubVP, subvp_table),
    "VE": (sdegen.VE, ve_table),
    "EDM": (sdegen.EDM, lambda t: (0 * t, 2 * t)),
    "FlowMatching": (sdegen.FlowMatching, flow_table(1e-3)),
    "FlowMatching(0.1)": (lambda: sdegen.FlowMatching(0.1), flow_table(0.1)),
    "RectifiedFlow": (sdegen.RectifiedFlow, flow_table(0.0)),
    "LearnedSchedule": (sdegen.LearnedSchedule, learned_table),
    # without frequencies
    "Blurring": (sdegen.Blurring, lambda t: TABLE["Cosine"][1](t)),
    # alpha = cos(pi t / 2): f = (log cos)', and sigma^2 = 1 - alpha^2 gives g^2 = -2 f.
    "Cosine": (
        sdegen.Cosine,
        lambda t: (-np.pi / 2 * np.tan(np.pi * t / 2), np.pi * np.tan(np.pi * t / 2)),
    ),
    "DDPM": (sdegen.DDPM, ddpm_table),
    "LinearSDE": (sdegen.LinearSDE, lambda t: (0 * t - 1, 0 * t + 2)),
}


def test_the_table_has_every_process():
    assert set(PROCESSES) <= set(TABLE)


def table_times(path):
    """Times off the kinks of DDPM, which are at i / T."""
    return np.linspace(0.01, 0.99, 99) * float(path.t_max) + 1e-4


@pytest.mark.parametrize("name", TABLE)
def test_coefficients_are_the_published_ones(name):
    make, table = TABLE[name]
    path = process(name) if name in PROCESSES else make()
    ts = table_times(path)
    f, g2 = table(ts)
    out = laws(path, ts)
    np.testing.assert_allclose(out.f, f, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(out.g2, g2, rtol=1e-10)


@pytest.mark.parametrize("name", TABLE)
def test_coefficients_are_the_published_ones_in_float32(name):
    make, table = TABLE[name]
    with jax.enable_x64(False):
        path = single(name) if name in PROCESSES else make()
        ts = table_times(path).astype(np.float32)
        out = laws(path, ts)
    assert out.f.dtype == out.g2.dtype == np.float32
    f, g2 = table(ts.astype(float))  # of the times as rounded
    np.testing.assert_allclose(out.f, f, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(out.g2, g2, rtol=1e-5)


def test_vp_has_its_golden_numbers():
    vp = process("VP")
    assert abs(-2 * np.log(vp.alpha(1.0)) - 10.05) < 1e-12
    assert abs(float(vp.alpha(0.3)) - 0.6295500003) < 1e-10
    assert abs(float(vp.sigma(0.3)) - 0.7769599713) < 1e-10


def test_ddpm_is_the_product_of_its_chain():
    bars, bar = [], 1.0
    for beta in np.linspace(1e-4, 0.02, 1000):
        bar *= 1 - beta
        bars.append(bar)
    out = laws(process("DDPM"), np.arange(1, 1001) / 1000)
    np.testing.assert_allclose(out.alpha**2, bars, rtol=1e-12)
    np.testing.assert_allclose(out.sigma**2, 1 - np.asarray(bars), rtol=1e-11)
    assert abs(out.alpha[-1] ** 2 / 4.035829765e-5 - 1) < 1e-9


def test_ddpm_of_the_vp_betas_tends_to_vp():
    # beta_i = beta(i/T)/T: the chain is a first-order step of the SDE: the gap halves.
    def gap(steps):
        i = np.arange(1, steps + 1)
        betas = (BETA_MIN + (BETA_MAX - BETA_MIN) * i / steps) / steps
        return float(sdegen.DDPM(betas).logsnr(0.5) - process("VP").logsnr(0.5))

    assert abs(gap(1000) / gap(2000) - 2) < 0.02


@pytest.mark.parametrize(
    "name, g2",
    [
        ("VP", BETA_MIN),
        ("SubVP", 0.0),
        ("EDM", 0.0),
        ("RectifiedFlow", 0.0),
        ("Cosine", 0.0),
        ("DDPM", -1000 * np.log1p(-1e-4)),
    ],
)
@pytest.mark.parametrize("dtype, rtol", [("float64", 1e-10), ("float32", 1e-5)])
def test_coefficients_are_finite_at_zero_where_sigma_vanishes(name, g2, dtype, rtol):
    with precision(name, dtype) as path:
        out = laws(path, np.zeros(1, dtype))
    # The published limits of f; sigma' is infinite at 0 for VP and DDPM.
    limit = {"VP": -BETA_MIN / 2, "SubVP": -BETA_MIN / 2, "RectifiedFlow": -1.0}
    limit["DDPM"] = 500 * np.log1p(-1e-4)
    np.testing.assert_allclose(out.f[0], limit.get(name, 0.0), rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(out.g2[0], g2, rtol=rtol, atol=1e-15)


# -- A1(b): f and g, integrated here, give alpha and sigma back ------------------------


@functools.cache
def collocation(nodes=6):
    """Gauss nodes on [0, 1], weights, and integrals of their Lagrange polynomials."""
    c, w = np.polynomial.legendre.leggauss(nodes)
    c, w = (c + 1) / 2, w / 2
    powers = np.arange(nodes)
    inside = c[:, None] ** (powers + 1) / (powers + 1)
    return c, w, inside @ np.linalg.inv(c[:, None] ** powers)


def transition_by_quadrature(path, edges):
    """(alpha, sigma^2) of t given s, from f and g alone.

    Panels whose Gauss nodes are inside, so that kinks of f at the edges do no harm.
    """
    c, w, inside = collocation()
    left, width = edges[:-1, None], np.diff(edges)[:, None]
    ts = left + width * c
    out = laws(path, ts.ravel())
    f, g2 = out.f.reshape(ts.shape), out.g2.reshape(ts.shape)
    panel = width[:, 0] * (f @ w)
    start = np.concatenate([[0.0], np.cumsum(panel)[:-1]])
    total = panel.sum()
    log_alpha = start[:, None] + width * (f @ inside.T)
    variance = np.sum(width * w * g2 * np.exp(2 * (total - log_alpha)))
    return np.exp(total), variance


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("s, t", [(0.01, 0.05), (0.05, 0.5), (0.3, 0.95)])
def test_coefficients_integrate_to_the_transition_law(name, s, t):
    path = process(name)
    # Multiples of 1/1000 of t_max: the panels of DDPM's steps.
    edges = np.linspace(s, t, int(round((t - s) * 1000)) + 1) * float(path.t_max)
    alpha_ts, variance_ts = transition_by_quadrature(path, edges)
    out = laws(path, edges[[0, -1]])
    np.testing.assert_allclose(out.alpha[1] / out.alpha[0], alpha_ts, rtol=1e-9)
    expected = out.sigma[1] ** 2 - alpha_ts**2 * out.sigma[0] ** 2
    np.testing.assert_allclose(expected, variance_ts, rtol=2e-9)


@pytest.mark.parametrize("name", PROCESSES)
def test_transitions_compose_and_never_unmix(name):
    # x_u = a_{u|t} (a_{t|s} x_s + s_{t|s} z) + s_{u|t} z': s -> t -> u must be s -> u.
    path = process(name)
    ts = np.sort(np.concatenate([span(path, 0, 1, 40), span(path, 0, 0.01, 9)[1:]]))
    alpha, sigma = laws(path, ts)[:2]
    a = alpha[1:] / alpha[:-1]
    variance = sigma[1:] ** 2 - a**2 * sigma[:-1] ** 2
    assert (variance >= 0).all()
    a_all, v_all = 1.0, 0.0
    for a_k, v_k in zip(a, variance, strict=True):
        a_all, v_all = a_all * a_k, v_all * a_k**2 + v_k
    np.testing.assert_allclose(a_all, alpha[-1] / alpha[0], rtol=1e-12)
    np.testing.assert_allclose(
        v_all, sigma[-1] ** 2 - (alpha[-1] / alpha[0]) ** 2 * sigma[0] ** 2, rtol=1e-12
    )


# -- A1(d): a cloud of paths -----------------------------------------------------------


def euler_law(path, grid, x0):
    """Mean and variance of Euler-Maruyama's chain, by its own exact recursion."""
    out, mean, variance = laws(path, grid[:-1]), x0, 0.0
    for h, f_k, g2_k in zip(np.diff(grid), out.f, out.g2, strict=True):
        mean, variance = mean * (1 + h * f_k), variance * (1 + h * f_k) ** 2 + h * g2_k
    return mean, variance


def true_law(path, grid, x0):
    alpha, sigma = laws(path, grid[[0, -1]])[:2]
    ratio = alpha[1] / alpha[0]
    return ratio * x0, sigma[1] ** 2 - ratio**2 * sigma[0] ** 2


def simulation_grid(path, steps):
    # Up to 0.95 t_max: FM, RF and Cosine have no coefficients at t_max itself.
    return np.linspace(float(path.t_min), 0.95 * float(path.t_max), steps + 1)


def check_cloud(path, paths, steps):
    x0, grid = 1.5, simulation_grid(path, steps)
    start = jnp.full((paths, 1), x0)
    out = sdegen.simulate(jax.random.key(7), path, start, grid=jnp.asarray(grid))
    assert bool(out.ok.all())
    x = np.asarray(out.x)[:, 0]
    mean, variance = euler_law(path, grid, x0)
    mean_error = (x.mean() - mean) / np.sqrt(variance / paths)
    variance_error = (x.var() / variance - 1) / np.sqrt(2 / paths)
    print(f"mean {mean_error:+.2f} SE, variance {variance_error:+.2f} SE")
    assert abs(mean_error) < 4 and abs(variance_error) < 4


@pytest.mark.parametrize("name", ["VP", "EDM", "RectifiedFlow"])
def test_simulated_paths_have_the_law_of_euler_maruyama(name):
    # Euler's chain is Gaussian with known moments, so no O(h) is forgiven here.
    check_cloud(process(name), paths=10_000, steps=100)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_law_of_euler_maruyama_tends_to_the_path(name):
    path, errors = process(name), []
    for steps in (1000, 2000):
        grid = simulation_grid(path, steps)
        mean, variance = euler_law(path, grid, 1.5)
        true_mean, true_variance = true_law(path, grid, 1.5)
        errors.append((abs(mean - true_mean), abs(variance / true_variance - 1)))
    (mean, variance), (mean_half, variance_half) = errors
    assert mean < 0.02 and 5e-6 < variance < 0.05
    if mean > 1e-10:  # the mean moves in a straight line, or not at all: no error
        assert abs(mean / mean_half - 2) < 0.1
    assert abs(variance / variance_half - 2) < 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("well_compiled")
def test_a_large_cloud_has_the_law_of_the_path():
    # A1(d): 2e5 paths, 1000 steps, against the transition law within 4 SE + O(h).
    path, paths, x0 = process("VP"), 200_000, 1.5
    grid = simulation_grid(path, 1000)
    start = jnp.full((paths, 1), x0)
    x = sdegen.simulate(jax.random.key(8), path, start, grid=jnp.asarray(grid)).x
    mean, variance = true_law(path, grid, x0)
    h = grid[1] - grid[0]
    assert abs(float(x.mean()) - mean) < 4 * np.sqrt(variance / paths) + 2 * h
    assert abs(float(x.var()) / variance - 1) < 4 * np.sqrt(2 / paths) + 8 * h


# -- the log-SNR and its inverse -------------------------------------------------------


def probes(path):
    """Times over the whole range, both ends, and very near them."""
    near = np.array([1e-9, 1e-6, 1e-4, 1e-3])
    a, b = float(path.t_min), float(path.t_max)
    unit = np.concatenate([[0.0], near, np.linspace(0.01, 0.99, 50), 1 - near, [1.0]])
    return np.clip(a + (b - a) * np.sort(unit), a, b)


@pytest.mark.parametrize("name", PROCESSES)
def test_logsnr_is_the_ratio_of_the_scales_and_falls(name):
    path = process(name)
    alpha, sigma, _, _, logsnr, tau = laws(path, probes(path))
    assert (np.diff(logsnr) < 0).all()
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(logsnr, np.log(alpha**2 / sigma**2), atol=1e-10)
    assert (np.diff(tau) > 0).all() and (tau > 0).all() and (tau <= 1).all()
    # y = x / (alpha + sigma) must be the rectified flow of (x0, z) at time tau.
    x0, z = 1.3, -0.7
    y = (alpha * x0 + sigma * z) / (alpha + sigma)
    np.testing.assert_allclose(y, (1 - tau) * x0 + tau * z, atol=1e-13)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-13), ("float32", 2e-6)])
def test_time_inverts_logsnr(name, dtype, tolerance):
    with precision(name, dtype) as path:
        ts = probes(path).astype(dtype)
        back, _ = times(path, laws(path, ts).logsnr)
        t_min, t_max = float(path.t_min), float(path.t_max)
    assert back.dtype == dtype
    ts, back = ts.astype(float), back.astype(float)
    # Relative to t itself; to the range where t starts at 0, for there sigma(0) > 0 and
    # sigma barely depends on t.
    scale = ts if t_min > 0 else t_max
    assert (np.abs(back - ts) / scale).max() < tolerance


@pytest.mark.parametrize("name", PROCESSES)
def test_time_beyond_the_ends_is_the_end(name):
    path = process(name)
    found = times(path, np.array([1e3, -1e3]))[0]
    assert found.tolist() == [float(path.t_min), float(path.t_max)]


@pytest.mark.parametrize("name", ["RectifiedFlow", "FlowMatching", "Cosine"])
def test_no_signal_at_all_is_t_max(name):
    path = process(name)
    assert float(path.alpha(path.t_max)) == 0
    assert float(path.logsnr(path.t_max)) == -np.inf
    assert float(path.flow_time(path.t_max)) == 1
    assert float(path.time(-jnp.inf)) == 1
    # Just above, alpha / sigma = r: solve for 1 - t by hand.
    r = np.exp(-10)
    gap = {
        "RectifiedFlow": r / (1 + r),
        "FlowMatching": r / (1 + (1 - 1e-3) * r),
        "Cosine": np.arctan(r) * 2 / np.pi,
    }
    assert abs((1 - float(path.time(-20.0))) / gap[name] - 1) < 1e-10


@pytest.mark.parametrize("name", PROCESSES)
def test_the_derivative_of_time_is_that_of_the_inverse(name):
    path = process(name)
    ts = span(path, 0.01, 0.97, 7) + 3e-5 * float(path.t_max)  # off DDPM's kinks
    logsnr, h = laws(path, ts).logsnr, 1e-5
    slope = times(path, logsnr)[1]
    finite = (times(path, logsnr + h)[0] - times(path, logsnr - h)[0]) / (2 * h)
    np.testing.assert_allclose(slope, finite, rtol=1e-6)


PARAMETERS = [
    ("VP", "beta_min"),
    ("VP", "beta_max"),
    ("SubVP", "beta_max"),
    ("VE", "sigma_min"),
    ("VE", "sigma_max"),
    ("FlowMatching", "sigma_min"),
]


@pytest.mark.parametrize("name, field", PARAMETERS)
def test_the_derivative_of_time_reaches_the_schedule(name, field):
    cls, value = PROCESSES[name], float(getattr(process(name), field))

    @jax.jit
    @jax.value_and_grad
    def time_at(v):
        return cls(**{field: v}).time(-1.0)

    h = 1e-5 * value
    finite = (time_at(value + h)[0] - time_at(value - h)[0]) / (2 * h)
    assert abs(finite) > 1e-6  # else nothing is tested
    np.testing.assert_allclose(time_at(value)[1], finite, rtol=1e-6)


def test_the_derivative_of_time_reaches_every_beta_of_the_chain():
    betas = np.linspace(1e-3, 0.3, 20)

    @jax.jit
    @jax.value_and_grad
    def time_at(scale):
        return sdegen.DDPM(betas * scale).time(0.3)

    finite = (time_at(1 + 1e-6)[0] - time_at(1 - 1e-6)[0]) / 2e-6
    np.testing.assert_allclose(time_at(1.0)[1], finite, rtol=1e-6)


# -- fields are arrays: grad, vmap, no retracing ---------------------------------------


def test_the_gradient_of_sigma_in_beta_is_the_closed_form():
    # sigma^2 = 1 - exp(-B), dB/dbeta_max = t^2/2: dsigma = (1 - sigma^2) t^2/(4 sigma).
    t = 0.4
    grad = jax.grad(lambda b: sdegen.VP(beta_max=b).sigma(t))(20.0)
    sigma = np.sqrt(1 - np.exp(-(0.1 * t + 9.95 * t**2)))
    assert abs(float(grad) - (1 - sigma**2) * t**2 / (4 * sigma)) < 1e-12
    tree = eqx.filter_grad(lambda path: path.sigma(t))(process("VP"))
    assert abs(float(tree.beta_max - grad)) < 1e-15
    assert float(tree.t_max) == 0


@pytest.mark.parametrize("name, field", PARAMETERS)
def test_vmap_over_a_parameter_equals_a_loop(name, field):
    cls, value = PROCESSES[name], float(getattr(process(name), field))
    values = value * jnp.array([0.5, 1.0, 2.0])
    many = eqx.filter_vmap(lambda v: cls(**{field: v}))(values)
    assert getattr(many, field).shape == (3,)

    def numbers(path):
        t = 0.37
        first = path.alpha(t), path.sigma(t), path.drift(t, 1.0), path.diffusion(t, 1.0)
        return jnp.stack([*first, path.time(0.2)])

    together = eqx.filter_jit(eqx.filter_vmap(numbers))(many)
    one = jax.jit(lambda v: numbers(cls(**{field: v})))
    alone = jnp.stack([one(v) for v in values])
    np.testing.assert_allclose(together, alone, rtol=1e-14)
    assert np.ptp(together[:, 1]) > 1e-6


def count_traces(fn):
    """`fn` jitted, and the list of the first arguments that it was traced with."""
    traced = []

    def counted(*args):
        traced.append(type(args[0]))
        return fn(*args)

    return eqx.filter_jit(counted), traced


@pytest.mark.parametrize("name, field", PARAMETERS + [(n, "t_max") for n in PROCESSES])
def test_another_value_does_not_retrace(name, field):
    fn, traced = count_traces(lambda path, t: path.sigma(t) * getattr(path, field))
    outs = []
    for v in (0.7, jnp.array(0.8), np.float64(0.9)):
        path = PROCESSES[name](**{field: v})
        outs.append(float(fn(path, 0.5)) / float(path.sigma(0.5)))
    assert traced == [PROCESSES[name]]
    np.testing.assert_allclose(outs, [0.7, 0.8, 0.9], rtol=1e-14)


def test_another_class_retraces():
    fn, traced = count_traces(lambda path, t: path.sigma(t))
    for path in (sdegen.VP(), sdegen.SubVP(), sdegen.VP(beta_max=10.0)):
        fn(path, 0.5)
    assert traced == [sdegen.VP, sdegen.SubVP]


@pytest.mark.parametrize("name", PROCESSES)
def test_float32_stays_float32_and_close(name):
    exact = process(name)
    ts = span(exact, 0.01, 0.9, 13) + 3e-5 * float(exact.t_max)
    ts = ts.astype(np.float32)
    with precision(name, "float32") as path:
        out = laws(path, ts)
        back, _ = times(path, out.logsnr)
        assert path.drift(ts[0], jnp.ones(3)).dtype == np.float32
    assert {a.dtype.name for a in (*out, back)} == {"float32"}
    for value, expected in zip(out, laws(exact, ts.astype(float)), strict=True):
        floor = 1e-6 * np.abs(expected).max()  # a log-SNR crosses 0
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=floor)


# -- grids -----------------------------------------------------------------------------

GRIDS = {
    "uniform": sdegen.UniformGrid,
    "flow time": sdegen.FlowTimeGrid,
    "log-SNR": sdegen.LogSNRGrid,
    "Karras": sdegen.KarrasGrid,
}


@eqx.filter_jit
def make_grids(path, steps=24):
    return {kind: grid(steps)(path) for kind, grid in GRIDS.items()}


@functools.cache
def grids(name, dtype):
    """24 steps of every grid on the default object."""
    with precision(name, dtype) as path:
        return {kind: np.asarray(ts) for kind, ts in make_grids(path).items()}


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_grids_fall_strictly_between_exact_ends(name, dtype):
    with precision(name, dtype) as path:
        high, low = float(path.t_max), float(path.t_min)
    for ts in grids(name, dtype).values():
        assert ts.shape == (25,) and ts.dtype == dtype
        assert ts[0] == high and ts[-1] == low
        assert (np.diff(ts) < 0).all()


@pytest.mark.parametrize("name", PROCESSES)
def test_grids_are_equal_steps_of_their_clock(name):
    clocks = {
        "uniform": lambda t, out: t,
        "flow time": lambda t, out: out.sigma / (out.alpha + out.sigma),
        "log-SNR": lambda t, out: np.log(out.alpha / out.sigma),
        "Karras": lambda t, out: (out.sigma / out.alpha) ** (1 / 7),
    }
    for kind, ts in grids(name, "float64").items():
        if kind in ("log-SNR", "Karras"):
            ts = ts[1:-1]  # these begin at a floor where alpha = 0
        steps = np.diff(clocks[kind](ts, laws(process(name), ts)))
        np.testing.assert_allclose(steps, steps.mean(), rtol=1e-9)


def test_a_grid_of_one_step_is_both_ends():
    for ts in make_grids(process("VP"), 1).values():
        assert [float(t) for t in ts] == [1.0, 1e-3]


def test_the_karras_grid_has_its_golden_sigmas():
    # A16(a): 18 noise levels from 80 to 0.002; EDM's time is the noise level.
    sigmas = sdegen.KarrasGrid(17)(process("EDM"))
    golden = {1: 57.5859847, 8: 3.25682152, 9: 1.92333984, 16: 0.00752801996}
    for i, sigma in golden.items():
        assert abs(float(sigmas[i]) / sigma - 1) < 1e-8


@functools.cache
def levels(name):
    """log-SNRs of both noise grids on a process cut to log-SNR 4 .. -3."""
    path = process(name)
    high, low = times(path, np.array([4.0, -3.0]))[0]
    cut = PROCESSES[name](t_min=high, t_max=low)
    made = make_grids(cut)
    return [laws(cut, np.asarray(made[k])).logsnr for k in ("log-SNR", "Karras")]


@pytest.mark.parametrize("name", sorted(set(PROCESSES) - {"EDM"}))
def test_noise_grids_visit_the_same_log_snr_on_any_process(name):
    for mine, reference in zip(levels(name), levels("EDM"), strict=True):
        np.testing.assert_allclose(mine, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("steps", [0, -3])
def test_a_grid_refuses_a_number_of_steps_that_is_none(kind, steps):
    with pytest.raises(ValueError, match="whole number of steps >= 1, got"):
        GRIDS[kind](steps)


# -- refusals --------------------------------------------------------------------------


class UserPath(sdegen.AbstractPath):
    """A path as a user would write it, with the mistake in its exponents."""

    power: Scalar = number(1.0)
    t_min: Scalar = number(0.01)
    t_max: Scalar = number(1.0)
    noise: sdegen.AbstractNoise = eqx.field(default_factory=sdegen.Gaussian)

    def alpha(self, t):
        return 1.1 - t

    def sigma(self, t):
        return t**self.power


class UserSDE(sdegen.AbstractLinearSDE):
    """The same as a linear SDE."""

    power: Scalar = number(1.0)
    t_min: Scalar = number(0.01)
    t_max: Scalar = number(1.0)
    noise: sdegen.AbstractNoise = eqx.field(default_factory=sdegen.Gaussian)

    def alpha(self, t):
        return 1.1 - t

    def sigma(self, t):
        return t**self.power


@pytest.mark.parametrize("name", PROCESSES)
def test_an_empty_range_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} needs 0 <=? t_min < t_max, got"):
        PROCESSES[name](t_min=0.6, t_max=0.5)
    with pytest.raises(ValueError, match=f"{name} needs 0 <=? t_min < t_max, got"):
        PROCESSES[name](t_min=0.5, t_max=0.5)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_negative_time_is_refused(name):
    with pytest.raises(ValueError, match="t_min=-0.1"):
        PROCESSES[name](t_min=-0.1)


# LinearSDE has its own sentence.
NOISY_AT_ZERO = {"VE", "FlowMatching", "LinearSDE", "LearnedSchedule"}


@pytest.mark.parametrize("name", sorted(set(PROCESSES) - NOISY_AT_ZERO))
def test_a_sigma_of_zero_at_t_min_is_refused(name):
    with pytest.raises(ValueError, match=r"sigma\(0\)=-?0. Move t_min=0"):
        PROCESSES[name](t_min=0.0)


@pytest.mark.parametrize("cls", [UserPath, UserSDE])
def test_a_users_path_works_and_one_whose_log_snr_rises_is_refused(cls):
    path = cls()
    assert abs(float(path.time(path.logsnr(0.4))) - 0.4) < 1e-13
    # sigma = t^-1: noise that shrinks faster than the data do, at first.
    with pytest.raises(ValueError, match="needs a log-SNR.*falls as t rises, got"):
        cls(power=-1.0)
    # alpha turns negative beyond 1.1
    with pytest.raises(ValueError, match=r"needs alpha\(t\) > 0 and sigma\(t\) > 0"):
        cls(t_max=1.5)


def test_a_rise_in_the_middle_of_the_range_is_found():
    class Bumpy(sdegen.AbstractPath):
        t_min: Scalar = number(0.01)
        t_max: Scalar = number(1.0)
        noise: sdegen.AbstractNoise = eqx.field(default_factory=sdegen.Gaussian)

        def alpha(self, t):
            return jnp.ones_like(t)

        def sigma(self, t):  # falls from 1/3 to 2/3 only
            return t + 0.25 * jnp.sin(3 * jnp.pi * t)

    with pytest.raises(ValueError, match="Bumpy needs a log-SNR.*falls as t rises"):
        Bumpy()


@pytest.mark.parametrize("name", PROCESSES)
def test_noise_that_is_not_gaussian_is_refused_for_an_sde(name):
    with pytest.raises(ValueError, match=f"{name} is a linear SDE.*noise=StudentT"):
        PROCESSES[name](noise=sdegen.StudentT())


def test_noise_that_is_not_gaussian_is_fine_for_a_path():
    path = UserPath(noise=sdegen.StudentT())
    assert not path.noise.gaussian


@pytest.mark.parametrize("betas", [[1.0, 0.1], [0.0, 0.1], [-0.1, 0.2], [0.1, 1.5]])
def test_a_chain_refuses_variances_outside_zero_one(betas):
    with pytest.raises(ValueError, match="variances between 0 and 1, got betas"):
        sdegen.DDPM(np.array(betas))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_a_chain_refuses_betas_of_another_shape(shape):
    with pytest.raises(ValueError, match="one array of length T >= 2, got an array of"):
        sdegen.DDPM(np.full(shape, 0.1))


def test_a_chain_refuses_to_go_beyond_its_last_step():
    with pytest.raises(ValueError, match=r"ends at t = 1 \(step T\), got t_max=1.5"):
        sdegen.DDPM(t_max=1.5)


def test_derived_marginals_refuse_half_an_equation():
    with pytest.raises(ValueError, match="needs both coefficients.*only one of them"):
        sdegen.LinearSDE(lambda t, p: -t)
    with pytest.raises(ValueError, match="needs both coefficients.*only one of them"):
        sdegen.LinearSDE(g=lambda t, p: 1.0 + t)


def test_derived_marginals_refuse_coefficients_of_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"that broadcast.*\(3,\) and \(2,\)"):
        sdegen.LinearSDE(lambda t, p: -jnp.ones(3) * t, lambda t, p: jnp.ones(2))


def test_derived_marginals_refuse_to_start_at_zero():
    with pytest.raises(ValueError, match="LinearSDE needs 0 < t_min < t_max.*a little"):
        sdegen.LinearSDE(t_min=0.0)


def test_derived_marginals_refuse_coefficients_that_blow_up():
    # Where f is infinite a step is hit or not: either sentence names the equations.
    with pytest.raises(ValueError, match="(could not|did not).*moment equations"):
        sdegen.LinearSDE(lambda t, p: -1 / (0.5 - t) ** 2, lambda t, p: 1.0 + t)


# -- schedules of chains ---------------------------------------------------------------


def test_zero_terminal_snr_is_the_algorithm_of_lin_et_al():
    betas = np.linspace(1e-4, 0.02, 1000)
    new = sdegen.zero_terminal_snr(betas)
    bar, was = np.sqrt(np.cumprod(1 - new)), np.sqrt(np.cumprod(1 - betas))
    scale = was[0] / (was[0] - was[-1])
    np.testing.assert_allclose(bar, (was - was[-1]) * scale, rtol=1e-9, atol=1e-12)
    assert new[-1] == 1 and np.isclose(new[0], betas[0])


def test_a_chain_ends_in_noise_where_its_last_variance_is_one():
    path = sdegen.DDPM(np.array([0.1, 0.3, 0.6, 1.0]))
    ts, shift = jnp.array([0.25, 0.5, 0.75, 0.875, 1.0]), np.cumprod([0.9, 0.7, 0.4])
    exact = np.append(np.sqrt(shift), [np.sqrt(shift[-1]) / 2, 0])  # linear at the end
    (alpha, sigma), (fall, rise) = jax.vmap(path.scales_and_rates)(ts)
    np.testing.assert_allclose(alpha, exact, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-9)
    np.testing.assert_allclose(fall[2:], -4 * exact[2], rtol=1e-9)
    assert np.isfinite(rise).all()
    with pytest.raises(ValueError, match="Only the last may be 1.*respaced_betas"):
        sdegen.DDPM(np.array([0.1, 1.0, 0.5]))


def test_respaced_variances_are_fewer_steps_of_the_same_chain():
    betas = np.linspace(1e-4, 0.02, 1000)
    few, ts = sdegen.respaced_betas(betas, 10), jnp.arange(1, 11) / 10
    alpha = jax.vmap(sdegen.DDPM(few).alpha)(ts)
    np.testing.assert_allclose(alpha, jax.vmap(sdegen.DDPM().alpha)(ts), rtol=1e-9)
    for wrong in (1, 2000):
        with pytest.raises(ValueError, match="from 2 to T, got"):
            sdegen.respaced_betas(betas, wrong)


def test_a_grid_that_ends_at_the_data_ends_in_the_denoised_point():
    path, times = process("VP"), [1.0, 0.5, 0.1]
    key, denoiser = jax.random.key(0), G1.denoiser(path)
    asked = sdegen.sample(key, denoiser, (5, 1), grid=jnp.array(times), denoise=True)
    found = sdegen.sample(key, denoiser, (5, 1), grid=jnp.array([*times, 0.0]))
    assert (found.x == asked.x).all() and found.evaluations == 3
    for bad in ([1.0, 0.0], [1.0, 0.5, 1e-5]):
        with pytest.raises(ValueError, match="last time of 0"):
            sdegen.sample(key, denoiser, (5, 1), grid=jnp.array(bad))
