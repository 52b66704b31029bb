"""Poisson flows: the field of charges, its kernel, and what it does to known data."""

import math

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from atoms import CORNERS, SHARES, Atoms, bar, basins
from oracle import G1, PROBES

import sdegen
from sdegen import nets, prediction
from sdegen.models.denoiser import PosteriorMean

KEY = jax.random.key(0)
PFGM = sdegen.PoissonFlow(1)


@eqx.filter_jit
def draws(law, key, n, shape):
    return jax.vmap(lambda k: law.sample(k, shape))(jax.random.split(key, n))


# -- the kernel ------------------------------------------------------------------------


def radial_mass(log_density, d):
    """int p(|x|) dx over R^d, by the trapezoidal rule in sinh^-1 of log r."""
    s = np.linspace(-5.0, 5.0, 1601)
    r, step = np.exp(2 * np.sinh(s)), s[1] - s[0]
    points = jnp.zeros((len(s), d)).at[:, 0].set(r)
    sphere = 2 * np.pi ** (d / 2) / math.gamma(d / 2)
    p = np.asarray(jax.jit(jax.vmap(log_density))(points))
    return np.sum(np.exp(p + d * np.log(r)) * 2 * np.cosh(s)) * step * sphere


@pytest.mark.parametrize("d", [1, 2, 3, 8])
def test_the_kernel_is_poisson_s_and_has_mass_one(d):
    for z in (0.1, 1.0, 10.0):

        def log_density(x):
            return PFGM.noise.log_prob(x / PFGM.sigma(z)) - d * jnp.log(z)  # noqa: B023

        assert abs(radial_mass(log_density, d) - 1) < 1e-7
        x = jnp.linspace(-3.0, 2.0, d) if d > 1 else jnp.array([0.7])
        constant = math.gamma((d + 1) / 2) / np.pi ** ((d + 1) / 2)
        kernel = constant * z / (x @ x + z**2) ** ((d + 1) / 2)
        assert abs(log_density(x) - jnp.log(kernel)) < 1e-12


@pytest.mark.parametrize("n, dof", [(2, 1.0), (8, 1.0), (2, 128.0)])
def test_the_ratio_of_radius_and_height_is_a_beta_law(n, dof):
    # R = r sqrt(b / (1 - b)), b ~ Beta(N/2, D/2), r = sigma sqrt(D)
    z = draws(sdegen.PoissonFlow(dof).noise, KEY, 20_000, (n,))
    square = np.sum(np.asarray(z) ** 2, 1) / dof
    b = square / (1 + square)
    assert scipy.stats.kstest(b, scipy.stats.beta(n / 2, dof / 2).cdf).pvalue > 1e-3
    normal = np.random.default_rng(0).standard_normal((20_000, n))  # what it would see
    square = np.sum(normal**2, 1) / 1.05**2 / dof
    b = square / (1 + square)
    assert scipy.stats.kstest(b, scipy.stats.beta(n / 2, dof / 2).cdf).pvalue < 1e-3


def test_a_uniform_hemisphere_falls_on_the_plane_as_the_kernel():
    u = np.random.default_rng(0).standard_normal((20_000, 3))
    field = np.linalg.norm(u[:, :2], axis=1) / np.abs(u[:, 2])
    noise = np.linalg.norm(np.asarray(draws(PFGM.noise, KEY, 20_000, (2,))), axis=1)
    for r in (field, noise):
        law = scipy.stats.kstest(r, lambda r: 1 - 1 / np.sqrt(1 + r**2))
        assert law.pvalue > 1e-3


def test_cauchy_noise_in_single_precision(float32):
    z = np.asarray(draws(sdegen.StudentT(1.0), KEY, 100_000, (1,)))[:, 0]
    assert z.dtype == np.float32 and np.isfinite(z).all() and np.abs(z).max() > 1e4
    assert scipy.stats.kstest(z, "cauchy").pvalue > 1e-3
    # the density keeps its digits where two log-gammas of a million would cancel
    for dof in (1.0, 128.0, 1e6):
        x = jnp.array([0.3, -2.0, 5.0])
        exact = scipy.stats.multivariate_t(np.zeros(3), df=dof).logpdf(np.asarray(x))
        assert abs(float(sdegen.StudentT(dof).log_prob(x)) - exact) < 2e-5


def test_pfgm_and_edm_times():
    ends = [(1.0, 1e-3, 40.0), (128.0, 0.002, 80.0)]
    for dof, low, high in ends:
        path = sdegen.PoissonFlow(dof)
        assert (float(path.t_min), float(path.t_max)) == (low, high)
    assert float(sdegen.PoissonFlow(3, t_max=10.0).t_max) == 10.0
    with pytest.raises(ValueError, match="positive number dof .* got 0"):
        sdegen.PoissonFlow(0.0)


# -- the field -------------------------------------------------------------------------


def potential(y):
    """phi = sum w / ((n - 2) S_n |y - (a, 0)|^(n-2)) in n = 3 dimensions."""
    gaps = y - jnp.concatenate([CORNERS, jnp.zeros((4, 1))], axis=1)
    return jnp.sum(SHARES / (4 * np.pi * jnp.sqrt(jnp.sum(gaps**2, -1))))


def field(y):
    return -jax.grad(potential)(y)


def test_the_velocity_is_that_along_the_field_lines():
    y = 1.5 * np.random.default_rng(0).standard_normal((200, 3))
    y[:, 2] = np.abs(y[:, 2]) + 0.05

    @jax.jit
    @jax.vmap
    def along(y):
        divergence = jnp.trace(jax.jacfwd(field)(y))
        v = Atoms(PFGM).denoiser().velocity(y[2], y[None, :2])[0]
        return field(y), divergence, v

    e, divergence, found = map(np.asarray, along(y))
    gaps = y[:, None] - np.c_[CORNERS, np.zeros(4)]
    cubes = np.linalg.norm(gaps, axis=-1, keepdims=True) ** 3
    coulomb = (SHARES[:, None] * gaps / cubes).sum(1) / (4 * np.pi)
    assert np.abs(e - coulomb).max() < 1e-10 * np.abs(e).max()
    assert np.abs(divergence).max() < 1e-8 * np.abs(e).max()
    # dx/dz = E_x / E_z
    assert np.abs(found - e[:, :2] / e[:, 2:]).max() < 1e-10 * np.abs(found).max()


def test_the_flux_through_a_sphere_is_the_charge():
    c, weights = np.polynomial.legendre.leggauss(60)
    angle = 2 * np.pi * np.arange(120) / 120
    u = np.stack(
        [
            np.sqrt(1 - c**2)[:, None] * np.cos(angle),
            np.sqrt(1 - c**2)[:, None] * np.sin(angle),
            np.broadcast_to(c[:, None], (60, 120)),
        ],
        axis=-1,
    )
    for radius, charge in ((4.0, 1.0), (0.5, 0.0)):
        e = jax.jit(jax.vmap(jax.vmap(field)))(radius * u)
        flux = np.sum(e * u, -1).sum(1) @ weights * 2 * np.pi / 120 * radius**2
        assert abs(flux - charge) < 1e-6


def test_cauchy_data_are_stretched():
    # data of the law Cauchy(a): dx/dz = x / (z + a), so x_z = x_0 (1 + z / a)
    a, n = 0.6, 4000
    angle = np.pi * (np.arange(n) + 0.5) / n - np.pi / 2
    x0 = a * np.tan(angle)  # equal weights under the law of the data
    x = jnp.array([[0.3], [-2.0], [7.0]])
    for z in (0.5, 3.0):
        exact = Atoms(PFGM, x0[:, None], np.full(n, 1 / n)).denoiser()
        found = exact.velocity(jnp.asarray(z), x)
        assert np.abs(found - x / (z + a)).max() < 1e-10
    stretched = PosteriorMean(lambda t, x, cond: a * x / (t + a), PFGM)
    out = sdegen.sample(
        KEY,
        stretched,
        (3, 1),
        start=x,
        solver=diffrax.Tsit5(),
        grid=sdegen.Adaptive(1e-12, 1e-12),
    )
    low, high = PFGM.t_min, PFGM.t_max
    assert np.abs(out.x - x * (low + a) / (high + a)).max() < 1e-9


# -- data come back --------------------------------------------------------------------

GRID = jnp.asarray(np.geomspace(40.0, 1e-3, 301))


def land(power=1.0, start=None, key=KEY, n=10_000):
    """Samples at z_min and after one last Euler step to z = 0."""
    denoiser = Atoms(PFGM, power=power).denoiser()
    out = sdegen.sample(key, denoiser, (n, 2), grid=GRID, start=start)
    assert bool(out.ok.all())
    return out.x, eqx.filter_jit(denoiser)(GRID[-1], out.x)


def test_every_charge_gets_its_share():
    runs = [land(key=jax.random.key(i)) for i in range(4)]
    early, last = (np.concatenate(x) for x in zip(*runs, strict=True))
    shares, gaps = basins(last)
    print("shares", shares, "near", np.mean(gaps < 0.05), np.mean(gaps < 1e-3))
    assert np.mean(gaps < 0.05) > 0.995 and np.mean(gaps < 1e-3) > 0.99
    assert (np.abs(shares - SHARES) < bar(40_000)).all()
    # without the last step a sample is z_min times a Cauchy draw away
    near = np.mean(basins(early)[1] < 0.05)
    assert abs(near - 0.980) < 4 * math.sqrt(0.02 * 0.98 / 40_000) + 2e-3


BUGS = {
    "exponent d/2": ({"power": 2 / 3}, (0.036, 0.123, 0.346, 0.495)),
    "exponent (d+2)/2": ({"power": 4 / 3}, (0.130, 0.218, 0.283, 0.370)),
    "normal prior": (
        {"start": 40 * jax.random.normal(KEY, (10_000, 2))},
        (0.081, 0.191, 0.307, 0.421),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_field_or_prior_is_seen_in_the_shares(bug):
    options, known = BUGS[bug]
    shares = basins(land(**options)[1])[0]
    print(bug, shares)
    assert (np.abs(shares - SHARES) > bar(10_000)).any()
    assert (np.abs(shares - np.array(known)) < bar(10_000)).all()


def faddeeva(zeta, terms=48):
    """exp(-zeta^2) erfc(-i zeta) for Im zeta >= 0 (Weideman 1994, eq. 37-38)."""
    m = 2 * terms
    scale = math.sqrt(terms / math.sqrt(2))
    theta = np.pi * np.arange(-m + 1, m) / m
    t = scale * np.tan(theta / 2)
    values = np.append(0.0, np.exp(-(t**2)) * (scale**2 + t**2))
    a = np.real(np.fft.fft(np.fft.fftshift(values))) / (2 * m)
    big = (scale + 1j * zeta) / (scale - 1j * zeta)
    p = jnp.polyval(jnp.asarray(a[1 : terms + 1][::-1]), big)
    return 2 * p / (scale - 1j * zeta) ** 2 + 1 / math.sqrt(np.pi) / (scale - 1j * zeta)


def voigt_mean(z, x, cond):
    """E[x0 | x] for G1 under Cauchy noise: E_x / E_z = (x - mean) / z."""
    w = faddeeva((x - G1.mu + 1j * z) / (G1.s * np.sqrt(2)))
    share = G1.w / G1.s
    return x - z * ((share * w.imag).sum(-1) / (share * w.real).sum(-1))[:, None]


def test_faddeeva_function_of_these_tests():
    zeta = np.array(
        [0.3 + 0.001j, -2.0 + 0.5j, 6.0 + 1e-3j, 30.0 + 40.0j, 900.0 + 1.0j]
    )
    found = np.asarray(faddeeva(zeta))
    assert np.abs(found / scipy.special.wofz(zeta) - 1).max() < 1e-9


@pytest.mark.parametrize(
    "z_max, centred, error",
    [(40.0, 0, 5.1e-3), (40.0, 1, 1.9e-4), (400.0, 0, 5.2e-4), (400.0, 1, 1.9e-6)],
)
def test_quantiles_come_back_from_a_cauchy_prior(z_max, centred, error):
    path = sdegen.PoissonFlow(1, t_min=1e-6, t_max=z_max)
    prior = z_max * np.tan(np.pi * (PROBES - 0.5)) + centred * G1.mean
    out = sdegen.sample(
        KEY,
        PosteriorMean(voigt_mean, path),
        (7, 1),
        start=jnp.asarray(prior)[:, None],
        solver=diffrax.Dopri8(),
        grid=sdegen.Adaptive(1e-10, 1e-10),
    )
    found = np.abs(out.x[:, 0] - G1.quantile(PROBES)).max()
    print(f"z_max {z_max:g}, centred {centred}: {found:.3e}")
    assert 0.95 * error < found < 1.05 * error


# -- PFGM++ ----------------------------------------------------------------------------


def test_one_more_dimension_is_pfgm():
    y = jax.random.normal(KEY, (50, 2))
    for z in (0.01, 0.8, 30.0):
        gaps = np.linalg.norm(np.asarray(y)[:, None] - CORNERS, axis=-1)
        weights = SHARES * (gaps**2 + z**2) ** -1.5
        mean = weights @ CORNERS / weights.sum(1, keepdims=True)
        found = Atoms(PFGM)(jnp.asarray(z), y, None)
        assert np.abs(found - mean).max() < 1e-12


def test_many_more_dimensions_are_gaussian_noise():
    side = np.linspace(-3.5, 3.5, 71)
    x = jnp.asarray(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2))
    normal = Atoms(sdegen.EDM())(jnp.asarray(0.8), x, None)
    mean = jax.jit(
        lambda dof: Atoms(sdegen.PoissonFlow(dof))(jnp.asarray(0.8), x, None)
    )
    gap = {dof: np.abs(mean(dof) - normal).max() for dof in (128.0, 2048.0, 1e6)}
    print(gap)  # c / D: 0.063, 0.0040, 8.3e-6 at points a little nearer
    for dof, known in ((128.0, 0.063), (2048.0, 0.0040), (1e6, 8.3e-6)):
        assert gap[dof] * dof == pytest.approx(1e6 * gap[1e6], rel=0.1 * 128 / dof)
        assert gap[dof] == pytest.approx(known, rel=0.2)


def test_the_variance_of_the_noise():
    # E R^2 / N = sigma^2 D / (D - 2)
    z = np.asarray(draws(sdegen.PoissonFlow(12.0).noise, KEY, 20_000, (4,)))
    square = np.mean(z**2, 1)
    assert abs(square.mean() - 1.2) < 4 * square.std() / math.sqrt(20_000)


class Mislabelled(sdegen.AbstractNoise):
    """Draws five per cent wider than its density says."""

    gaussian = False

    def sample(self, key, shape, dtype=None):
        return 1.05 * sdegen.StudentT().sample(key, shape, dtype)

    def log_prob(self, z):
        return sdegen.StudentT().log_prob(z)


def test_check_follows_the_flow_and_compares_draws_with_their_density():
    report = sdegen.check(sdegen.PoissonFlow(1))
    print(report)
    found = {row.name: row for row in report.rows if row.passed}
    assert report.ok and found["flow"].residual < 1e-3 and "noise draws" in found
    wrong = sdegen.StraightFlow(noise=Mislabelled())
    report = sdegen.check(wrong, parts=("terminal",))
    assert [row.name for row in report.failed] == ["noise draws"]


# -- networks for heavy tails ----------------------------------------------------------


def test_tails_keep_a_network_s_work_of_order_one():
    """What a network has to say to be exact, F of the docstring, in bulk and tails."""
    data, exact = 1.0, Atoms(PFGM).denoiser()
    bulk = np.array([[0.1, 0.2], [-1.0, 0.5]])
    tail = np.array([[10.0, 3.0], [-1e3, 2e3], [1e7, 0.0]])

    def wrapped(factor, seen):
        def call(t, x, cond):
            seen.append(x)
            return jnp.full_like(x, factor)

        net = nets.HeavyTailed(call, data)
        return sdegen.Denoiser(net, PFGM, prediction=prediction.x0, sigma_data=data)

    @jax.jit
    def says(t, x):
        """(x_in, F) of equation (1), and F of EDM, from two calls of the wrapper."""
        seen = []
        skip, one = (wrapped(f, seen)(t, x) for f in (0.0, 1.0))
        d, scale = exact(t, x), jnp.sqrt(t**2 + data**2)
        edm = (d - data**2 / scale**2 * x) / (t * data / scale)
        return seen[0], (d - skip) / (one - skip), edm

    for t in (1e-3, 0.03, 1.0, 30.0):
        x = jnp.concatenate([CORNERS[0] + t * bulk, max(t, 1.0) * tail])
        seen, f, edm = map(np.asarray, says(jnp.asarray(t), x))
        print(t, np.abs(seen).max(), np.abs(f).max(), np.abs(edm).max())
        assert np.abs(seen).max() <= math.sqrt(2) and np.abs(f).max() < 2
        assert np.abs(f - edm)[:2].max() < 1e-9  # the same in the bulk
        assert np.abs(edm).max() > 1e5  # and not at all in the tails
