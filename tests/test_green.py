"""Green's functions: noise whose radius has a given law, and what follows from it."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from atoms import SHARES, Atoms, bar, basins
from jax.scipy.special import betainc, gammainc

import sdegen
from sdegen.processes.noise import tanh_profile

KEY = jax.random.key(0)
LAWS = {"tanh": tanh_profile, "exponential": lambda r: -jnp.expm1(-r)}


def kernel(noise, d):
    """log p_t(x | 0) of x = t z as a function of (t, r)."""

    def log_p(t, r):
        return noise.log_prob(jnp.zeros(d).at[0].set(r / t)) - d * jnp.log(t)

    return log_p


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("name", LAWS)
def test_the_density_has_the_radial_law_and_carries_its_flux(name, d):
    psi, sphere = LAWS[name], 2 * np.pi ** (d / 2) / math.gamma(d / 2)
    log_p = kernel(sdegen.Radial(psi), d)
    nodes, weights = (jnp.asarray(v) for v in np.polynomial.legendre.leggauss(60))

    @jax.jit
    def ball(t, end):
        """Mass; what leaves, p times x / t through the surface; what the ball loses."""
        r = end * (nodes + 1) / 2
        p = jnp.exp(jax.vmap(lambda r: log_p(t, r))(r))
        mass = sphere * jnp.sum(weights * p * r ** (d - 1)) * end / 2
        flux = sphere * end ** (d - 1) * jnp.exp(log_p(t, end)) * end / t
        return mass, flux, -jax.grad(lambda t: psi(end / t))(t)

    for t in (0.5, 3.0):
        for r in (0.3 * t, 2.0 * t):
            found, flux, loss = ball(t, r)
            assert abs(found - psi(r / t)) < 1e-8 and abs(flux - loss) < 1e-9
        assert abs(ball(t, 24.0 * t)[0] - 1) < 1e-8


@pytest.mark.parametrize("d", [1, 2, 5])
def test_known_kernels_are_radial_laws(d):
    known = [
        (sdegen.Gaussian(), lambda r: gammainc(d / 2, r**2 / 2)),
        (sdegen.StudentT(1.0), lambda r: betainc(d / 2, 0.5, r**2 / (1 + r**2))),
    ]
    x = jnp.linspace(-1.0, 2.0, d) if d > 1 else jnp.array([0.7])
    for law, psi in known:
        log_probs = [sdegen.Radial(psi).log_prob, law.log_prob]
        both = jax.jit(lambda z: [log_p(z) for log_p in log_probs])  # noqa: B023
        for scale in (0.3, 1.0, 2.0):
            found, exact = both(scale * x)
            assert abs(found - exact) < 1e-9


@pytest.mark.parametrize("name, d", [("tanh", 1), ("exponential", 2), ("tanh", 5)])
def test_draws_have_the_radial_law_in_every_direction(name, d):
    inverse = {"tanh": jnp.arctanh, "exponential": lambda u: -jnp.log1p(-u)}[name]

    @eqx.filter_jit
    def draw(law, n):
        keys = jax.random.split(KEY, n)
        return jax.vmap(lambda k: law.sample(k, (d,)))(keys)

    z = np.asarray(draw(sdegen.Radial(LAWS[name]), 20_000))
    r = np.linalg.norm(z, axis=1)
    assert scipy.stats.kstest(r, lambda r: np.asarray(LAWS[name](r))).pvalue > 1e-3
    u = z / r[:, None]
    assert (np.abs(u.mean(0)) < 4.5 / math.sqrt(20_000 * d)).all()
    assert np.abs(u.T @ u / 20_000 - np.eye(d) / d).max() < 5 / math.sqrt(20_000)
    given = draw(sdegen.Radial(LAWS[name], quantile=inverse), 20_000)
    assert np.abs(given - z).max() < 1e-6 * np.abs(z).max()


def test_draws_in_single_precision(float32):
    keys = jax.random.split(KEY, 20_000)
    z = jax.jit(jax.vmap(lambda k: sdegen.Radial().sample(k, (2,))))(keys)
    r = np.linalg.norm(np.asarray(z), axis=1)
    assert z.dtype == np.float32 and np.isfinite(r).all()
    assert scipy.stats.kstest(r, np.tanh).pvalue > 1e-3


def test_the_score_at_the_middle_of_an_even_law_is_zero():
    noise = sdegen.Radial()
    assert jax.grad(noise.log_prob)(jnp.zeros(1)) == 0
    near = jax.grad(noise.log_prob)(jnp.array([1e-6]))
    assert abs(near + 2e-6) < 1e-12  # log sech^2 = -r^2 + ...
    _, forward = jax.jvp(noise.log_prob, (jnp.zeros(1),), (jnp.ones(1),))
    assert forward == 0


def test_the_field_of_many_sources_moves_their_law():
    # weak form on the line: d/dt E phi(x_t) = E phi'(x_t) v(x_t)
    path = sdegen.GreenFlow()
    points = jnp.array([[-1.5], [0.3], [1.0]])
    atoms = Atoms(path, points, np.array([0.2, 0.5, 0.3]))
    x = jnp.linspace(-60.0, 60.0, 12_001)
    step = x[1] - x[0]

    @lambda f: jax.jit(lambda t: list(f(t)))
    def sides(t):
        def density(t):
            log_p = jax.nn.logsumexp(atoms.log_joint(t, x[:, None]), axis=1)
            return jnp.exp(log_p) / t * step

        v = atoms.denoiser().velocity(t, x[:, None])[:, 0]
        for phi in (jnp.sin, lambda x: jnp.exp(-((x - 0.3) ** 2))):
            change = jax.jvp(lambda t: density(t) @ phi(x), (t,), (1.0,))[1]  # noqa: B023
            yield change, density(t) @ (jax.vmap(jax.grad(phi))(x) * v)

    for t in (0.4, 2.0):
        for change, moved in sides(jnp.asarray(t)):
            assert abs(change - moved) < 1e-8 and abs(moved) > 1e-3


def test_every_source_gets_its_share():
    atoms = Atoms(sdegen.GreenFlow()).denoiser()
    grid = jnp.asarray(np.geomspace(40.0, 1e-3, 301))
    last = []
    for i in range(2):
        out = sdegen.sample(jax.random.key(i), atoms, (10_000, 2), grid=grid)
        assert bool(out.ok.all())
        last.append(eqx.filter_jit(atoms)(grid[-1], out.x))
    shares, gaps = basins(np.concatenate(last))
    print("shares", shares)
    assert (np.abs(shares - SHARES) < bar(20_000)).all()
    assert np.mean(gaps < 1e-3) > 0.99


def test_what_is_no_distribution_function_is_refused():
    with pytest.raises(ValueError, match="distribution function of a radius.*psi\\(1"):
        sdegen.Radial(lambda r: 2 * jnp.tanh(r))
    with pytest.raises(ValueError, match=r"psi\(0\)=1"):
        sdegen.Radial(lambda r: jnp.exp(-r))
