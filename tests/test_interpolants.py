"""Tracks: characteristics from any prior, and interpolants between two laws."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from atoms import Atoms
from jax.scipy.stats import norm
from oracle import G1, PROBES

import sdegen
from sdegen.models.denoiser import PosteriorMean
from sdegen.processes import interpolant as interpolants

KEY = jax.random.key(0)
TIGHT = {"solver": diffrax.Dopri8(), "grid": sdegen.Adaptive(1e-11, 1e-11)}


# -- straight characteristics from a uniform prior -------------------------------------


def test_a_uniform_prior_is_cut_at_the_quantiles_of_the_data():
    # half of the data at 0.5, a quarter each at 1.2 and 1.7; prior on [0, 2]
    path = sdegen.StraightFlow(noise=sdegen.Box(0.0, 2.0))
    atoms = Atoms(path, np.array([[0.5], [1.2], [1.7]]), np.array([0.5, 0.25, 0.25]))
    x1 = np.arange(0.01, 2.0, 0.02)
    x1 = x1[(np.abs(x1 - 1) > 0.03) & (np.abs(x1 - 1.5) > 0.03)]
    exact = np.where(x1 < 1, 0.5, np.where(x1 < 1.5, 1.2, 1.7))
    out = sdegen.sample(
        KEY,
        PosteriorMean(in_the_box(atoms), path),
        (len(x1), 1),
        start=jnp.asarray(x1)[:, None],
        solver=diffrax.Euler(),
        grid=sdegen.UniformGrid(1000),
    )
    error = np.abs(out.x[:, 0] - exact).max()
    print(f"largest error {error:.2e}")
    assert 1e-3 < error < 2e-3  # t_end |x1 - x0|, at most 1.5e-3


def in_the_box(atoms):
    """The posterior mean; where rounding left every box, that of the nearest one."""

    def mean(t, x, cond):
        alpha, sigma = atoms.path.alpha(t), atoms.path.sigma(t)
        log_joint = atoms.log_joint(t, x)
        gap = jnp.abs((x - alpha * atoms.points[:, 0]) / sigma - 1)
        nearest = atoms.points[jnp.argmin(gap, axis=1)]
        lost = jnp.isinf(log_joint).all(1, keepdims=True)
        share = jax.nn.softmax(jnp.where(lost, 0.0, log_joint), axis=1)
        return jnp.where(lost, nearest, share @ atoms.points)

    return mean


def truncated_mean(t, x, cond):
    """E[x0 | (1 - t) x0 + t z = x] for G1 and z uniform on [-4, 4]."""
    low, high = (x - 4 * t) / (1 - t), (x + 4 * t) / (1 - t)
    a, b = (low - G1.mu) / G1.s, (high - G1.mu) / G1.s
    mass = G1.w * (norm.cdf(b) - norm.cdf(a))
    first = G1.mu * mass - G1.w * G1.s * (norm.pdf(b) - norm.pdf(a))
    return (first.sum(-1) / mass.sum(-1))[:, None]


def test_quantiles_come_back_from_a_uniform_prior():
    path = sdegen.StraightFlow(noise=sdegen.Box(-4.0, 4.0))
    out = sdegen.sample(
        KEY,
        PosteriorMean(truncated_mean, path),
        (7, 1),
        start=jnp.asarray(8 * PROBES - 4)[:, None],
        **TIGHT,
    )
    t, x = float(path.t_min), np.asarray(out.x)  # P((1 - t) x0 + t z < x) over z
    nodes, weights = np.polynomial.legendre.leggauss(20)
    cdf = G1.cdf((x - 4 * t * nodes) / (1 - t)) @ weights / 2
    error = np.abs(cdf - PROBES).max()
    print(f"quantile error {error:.1e}")
    assert bool(out.ok.all()) and error < 1e-8


def test_a_normal_prior_is_the_rectified_flow():
    straight = sdegen.StraightFlow(noise=sdegen.Gaussian())
    x = jnp.linspace(-2.0, 2.0, 9)[:, None]

    @jax.jit
    def three(t):
        found = G1.denoiser(straight).velocity(t, x)
        exact = G1.denoiser(sdegen.RectifiedFlow()).velocity(t, x)
        # and of the score: v = (x + t score) / -(1 - t)
        return found, exact, -(x + t * G1.score(x[:, 0], 1 - t, t)[:, None]) / (1 - t)

    for t in (0.01, 0.5, 0.99):
        found, exact, v = three(jnp.asarray(t))
        assert np.abs(found - exact).max() < 1e-12
        assert np.abs(found - v).max() < 1e-10


def test_the_laws_of_the_priors():
    box = sdegen.Box(jnp.array([-1.0, 0.0]), jnp.array([1.0, 5.0]))
    assert abs(box.log_prob(jnp.array([0.5, 4.9])) + np.log(10)) < 1e-12
    assert box.log_prob(jnp.array([0.5, 5.1])) == -jnp.inf
    rows = np.arange(6.0).reshape(3, 2)
    data = sdegen.Empirical(rows)

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, 4000)
        return [jax.vmap(lambda k: b.sample(k, (2,)))(keys) for b in (box, data)]  # noqa: B023

    z, some = draw(KEY)
    assert np.abs(z.mean(0) - np.array([0.0, 2.5])).max() < 5 * 1.45 / np.sqrt(4000)
    assert (z.min(0) < jnp.array([-0.99, 0.03])).all() and (z[:, 1] > 4.97).any()
    counts = np.array([(np.asarray(some) == row).all(1).sum() for row in rows])
    assert counts.sum() == 4000 and np.abs(counts - 4000 / 3).max() < 4 * 30
    assert data.log_prob(some[0]) is None
    with pytest.raises(ValueError, match=r"rows .* shape \(2,\), got a request for"):
        data.sample(KEY, (3,))
    with pytest.raises(ValueError, match="low < high"):
        sdegen.Box(1.0, 0.0)


# -- tracks that bend ------------------------------------------------------------------


class Sinh(sdegen.AbstractInterpolant):
    """x1 = sinh(x_t - x0) / t."""

    t_min: jax.Array = sdegen.number(0.05)
    t_max: jax.Array = sdegen.number(1.0)
    noise: sdegen.AbstractNoise = eqx.field(default_factory=sdegen.Gaussian)

    def interpolate(self, t, x0, x1):
        return x0 + jnp.arcsinh(t * x1)

    def gamma(self, t):
        return None


def other_end(t, x, x0):
    return jnp.sinh(x - x0) / t


def conditional(t, x, x0):
    """(velocity, density) at x of the track from x0."""
    x1 = other_end(t, x, x0)
    return Sinh().velocity(t, x0, x1), norm.pdf(x1) * jnp.cosh(x - x0) / t


def test_the_density_along_a_track_is_that_of_its_divergence():
    x0, t = jnp.asarray(0.4), 0.1
    nodes, weights = np.polynomial.legendre.leggauss(60)
    s = jnp.asarray(np.exp(np.log(t) * (1 - nodes) / 2))  # from t to 1

    @jax.jit
    def two(x1):
        def divergence(s):
            x = Sinh().point(s, x0, x1)
            return jax.grad(lambda x: conditional(s, x, x0)[0])(x)

        def log_p(t):
            return jnp.log(conditional(t, Sinh().point(t, x0, x1), x0)[1])

        integral = jnp.sum(weights * s * jax.vmap(divergence)(s)) * -np.log(t) / 2
        return log_p(1.0) + integral, log_p(t)

    for x1 in (-2.0, 0.3, 1.5):
        found, exact = two(jnp.asarray(x1))
        assert abs(found - exact) < 1e-8


def test_quantiles_come_back_along_bent_tracks():
    points, shares = np.array([-1.0, 0.2, 1.5]), np.array([0.25, 0.5, 0.25])

    def mean_velocity(t, x, cond):
        v, p = jax.vmap(jax.vmap(conditional, (None, None, 0)), (0, 0, None))(
            t, x[:, 0], jnp.asarray(points)
        )
        return jnp.sum(shares * v * p, 1, keepdims=True) / (p @ shares)[:, None]

    def cdf(t, x):
        return norm.cdf(other_end(t, x[:, None], points)) @ shares

    x = jnp.linspace(-2.5, 3.0, 12)
    model = sdegen.VelocityModel(mean_velocity, Sinh())
    out = sdegen.sample(KEY, model, (12, 1), start=x[:, None], **TIGHT)
    error = np.abs(cdf(0.05, out.x[:, 0]) - cdf(1.0, x)).max()
    print(f"quantile error {error:.1e}")
    assert bool(out.ok.all()) and error < 1e-8
    assert np.abs(cdf(0.05, x) - cdf(1.0, x)).max() > 0.02


class Spreading(sdegen.AbstractInterpolant):
    """A radial law that is not self-similar: psi_t(r) = 1 - exp(-(r / t)^(1 + t))."""

    t_min: jax.Array = sdegen.number(1e-3)
    t_max: jax.Array = sdegen.number(3.0)
    noise: sdegen.AbstractNoise = eqx.field(
        default_factory=lambda: sdegen.Radial(lambda r: -jnp.expm1(-r))
    )

    def interpolate(self, t, x0, x1):
        r = jnp.linalg.norm(x1)
        return x0 + t * r ** (1 / (1 + t)) * x1 / r

    def gamma(self, t):
        return None


def test_any_radial_law_moves_by_the_ratio_of_its_derivatives():
    psi = lambda t, r: -jnp.expm1(-((r / t) ** (1 + t)))  # noqa: E731
    x0, x1 = jnp.array([0.3, -1.0]), jnp.array([1.2, 0.5])
    for t in (0.2, 2.0):
        gap = Spreading().point(t, x0, x1) - x0
        r = jnp.linalg.norm(gap)
        speed = -jax.grad(psi, 0)(t, r) / jax.grad(psi, 1)(t, r)
        found = Spreading().velocity(t, x0, x1)
        assert np.abs(found - speed * gap / r).max() < 1e-10
        assert abs(psi(t, r) - Spreading().noise.psi(jnp.linalg.norm(x1))) < 1e-12


# -- stochastic interpolants -----------------------------------------------------------

MEANS = np.array([[1.0, -0.5], [0.2, 0.0]])
COVARIANCES = np.array([[[2.0, 1.2], [1.2, 1.0]], [[1.0, 0.0], [0.0, 0.2]]])
"""Data and the other end: two Gaussians that do not commute."""


class Line(eqx.Module):
    """Velocity or latent noise of the interpolant of the two Gaussians, exactly."""

    square: jax.Array = eqx.field(converter=jnp.asarray)  # gamma^2 = square t (1 - t)
    latent: bool = False

    def __call__(self, t, x, cond):
        def one(t, x):
            a, gamma2 = jnp.array([1 - t, t]), self.square * t * (1 - t)
            cov = jnp.tensordot(a**2, jnp.asarray(COVARIANCES), 1) + gamma2 * jnp.eye(2)
            (p, q), (_, r) = cov
            inverse = jnp.array([[r, -q], [-q, p]]) / (p * r - q**2)
            pull = inverse @ (x - a @ MEANS)
            if self.latent:
                return jnp.sqrt(gamma2) * pull
            rate = jnp.tensordot(jnp.array([t - 1, t]), jnp.asarray(COVARIANCES), 1)
            rate = rate + self.square * (1 - 2 * t) / 2 * jnp.eye(2)
            return MEANS[1] - MEANS[0] + rate @ pull

        return jax.vmap(one)(t, x)


def gaussians(square=2.0):
    interpolant = sdegen.StochasticInterpolant(jnp.sqrt(square))
    return sdegen.VelocityModel(Line(square), interpolant, Line(square, latent=True))


@eqx.filter_jit
def moments_at_the_data(model, level):
    """Mean and covariance of the linear equation, solved for to the last digits."""
    process = model.backward(level)
    drift = process if level is None else process.drift

    def rhs(s, y, args):
        mean, cov = y
        slope = jax.jacfwd(lambda x: drift(s, x))(mean)
        g = 0.0 if level is None else process.diffusion(s, mean)
        spread = slope @ cov + cov @ slope.T + g**2 * jnp.eye(2)
        return drift(s, mean), spread

    out = diffrax.diffeqsolve(
        diffrax.ODETerm(rhs),
        diffrax.Dopri8(),
        0.0,
        1.0,
        0.01,
        (jnp.asarray(MEANS[1]), jnp.asarray(COVARIANCES[1])),
        stepsize_controller=diffrax.PIDController(rtol=1e-11, atol=1e-11),
    )
    return tuple(y[-1] for y in out.ys)


@pytest.mark.parametrize("eps", [0.0, 0.5, 2.0])
def test_any_noise_level_ends_with_the_moments_of_the_data(eps):
    """eps multiplies gamma^2; the constant noise level is the next test's."""
    model, level = gaussians(), jnp.sqrt(eps) if eps else None
    mean, cov = map(np.asarray, moments_at_the_data(model, level))
    assert np.abs(mean - MEANS[0]).max() < 1e-9
    assert np.abs(cov - COVARIANCES[0]).max() < 1e-9
    if eps:
        process = model.backward(level)
        assert float(process.diffusion(0.5, MEANS[0])) ** 2 == pytest.approx(eps)


def test_the_score_and_the_velocity_obey_fokker_planck():
    # dp/dt + div((b + eps s) p) = eps laplace p at any constant eps, either direction
    model, t = gaussians(), jnp.asarray(0.3)

    def log_p(t, x):
        a = jnp.array([1 - t, t])
        cov = jnp.tensordot(a**2, jnp.asarray(COVARIANCES), 1)
        cov = cov + 2 * t * (1 - t) * jnp.eye(2)
        return jax.scipy.stats.multivariate_normal.logpdf(x, a @ MEANS, cov)

    @jax.jit
    def terms(y):
        b = lambda x: model.velocity(t, x[None])[0]  # noqa: E731
        score = jax.grad(log_p, 1)(t, y)
        flow = jnp.trace(jax.jacfwd(b)(y)) + b(y) @ score
        return model.score(t, y[None])[0] - score, jax.grad(log_p)(t, y) + flow

    # with the exact score the two terms in eps cancel: the continuity equation is left
    for y in ([0.3, -0.2], [1.5, 1.0]):
        gap, residual = terms(jnp.array(y))
        assert np.abs(gap).max() < 1e-10 and abs(residual) < 1e-10


def test_samples_with_and_without_noise():
    n = 3000
    x1 = np.random.default_rng(0).multivariate_normal(MEANS[1], COVARIANCES[1], n)
    model = gaussians()
    for strength, steps in ((0.0, 40), (1.5, 150)):
        out = sdegen.sample(
            KEY,
            model,
            (n, 2),
            start=jnp.asarray(x1),
            stochasticity=strength,
            grid=steps,
        )
        x = np.asarray(out.x)
        cov = COVARIANCES[0]
        spread = np.sqrt((np.outer(cov.diagonal(), cov.diagonal()) + cov**2) / n)
        assert bool(out.ok.all())
        assert (np.abs(x.mean(0) - MEANS[0]) < 4.5 * np.sqrt(cov.diagonal() / n)).all()
        assert (np.abs(np.cov(x.T) - cov) < 4.5 * spread + 0.01).all()
        moved = np.corrcoef(x1[:, 0], x[:, 0])[0, 1]
        print(f"stochasticity {strength}: correlation of the ends {moved:.2f}")
        assert moved > 0.85 if strength == 0 else moved < 0.8
    # without `start` it begins at the law of the base
    rows = sdegen.Empirical(x1[:5])
    interpolant = sdegen.StochasticInterpolant(noise=rows)
    first = sdegen.VelocityModel(Line(1.0), interpolant).start(KEY, (2,))
    assert np.abs(first - x1[:5]).max(1).min() < 1e-12


class At(sdegen.times.AbstractTimes):
    """One time only."""

    time: jax.Array = eqx.field(converter=jnp.asarray)
    stratified: bool = True

    def quantile(self, path, u):
        return self.time + 0 * u


class Affine(eqx.Module):
    """a x + c."""

    a: jax.Array = sdegen.number(0.0)
    c: jax.Array = sdegen.number(0.0)

    def __call__(self, t, x, cond):
        return self.a * x + self.c


@pytest.mark.parametrize("latent", [interpolants.bridge, None])
def test_the_loss_regresses_on_velocity_and_noise(latent):
    """The best affine model at one time is the one of the closed form."""
    t, n, runs = 0.3, 20_000, 16
    interpolant = sdegen.StochasticInterpolant(latent=latent)
    pair = (Affine(), Affine()) if latent else Affine()
    flat, build = jax.flatten_util.ravel_pytree(pair)

    def model(pair):
        one, *two = pair if latent else (pair,)
        return sdegen.VelocityModel(one, interpolant, *two)

    @jax.jit
    def best(key):
        x0 = 1 + 0.5 * jax.random.normal(key, (n, 1))
        loss = lambda p: sdegen.velocity_loss(  # noqa: E731
            model(build(p)), key, x0, times=At(t)
        )
        slope, curve = jax.grad(loss)(flat), jax.hessian(loss)(flat)
        return -jnp.linalg.solve(curve, slope)  # a quadratic loss: one Newton step

    found = np.stack([best(jax.random.key(i)) for i in range(runs)])
    g2, gg = (t * (1 - t), (1 - 2 * t) / 2) if latent else (0.0, 0.0)
    v = (1 - t) ** 2 * 0.25 + t**2 + g2
    a = (t - (1 - t) * 0.25 + gg) / v
    exact = [a, -1 - a * (1 - t)]
    if latent:
        exact += [np.sqrt(g2) / v, -np.sqrt(g2) / v * (1 - t)]
    bars = 4 * found.std(0, ddof=1) / np.sqrt(runs)
    print(found.mean(0), exact, bars)
    assert (np.abs(found.mean(0) - exact) < bars).all() and (bars < 0.02).all()


def test_pairs_keep_the_variance_of_the_loss_finite():
    model, x0 = gaussians(), jnp.asarray(MEANS[:1])

    @jax.jit
    def spread(t):
        def one(key):
            loss = eqx.Partial(sdegen.velocity_loss, times=At(t))
            return loss(model, key, x0), loss(model, key, x0, antithetic=False)

        return [jnp.std(a) for a in jax.vmap(one)(jax.random.split(KEY, 2000))]

    (near, near_single), (end, end_single) = spread(1e-3), spread(1e-5)
    print(near, end, near_single, end_single)
    assert end < 1.2 * near < 20  # the same at both
    assert end_single > 50 * near_single > 1000  # like 1 / t


def test_fit_trains_both_networks():
    data = 0.5 * np.random.default_rng(0).standard_normal((8192, 1))
    model = sdegen.VelocityModel(Affine(), sdegen.StochasticInterpolant(), Affine())
    done = sdegen.fit(
        model,
        data,
        steps=400,
        batch_size=512,
        optimizer=sdegen.AdamW(learning_rate=0.02, weight_decay=0.0),
        loss=sdegen.velocity_loss,
        steps_per_call=200,
        progress=False,
    )
    # with one slope for all times: int Cov(v, x) dt / int Var(x) dt, and so for z
    slopes = [float(net.a) for net in done.model.trained]
    var = (0.25 + 1) / 3 + 1 / 6
    print(slopes, 0.375 / var, np.pi / 8 / var)
    assert np.abs(np.array(slopes) - [0.375 / var, np.pi / 8 / var]).max() < 0.05


def test_weights_and_noises_of_interpolants():
    x0, x1 = jnp.array([1.0]), jnp.array([3.0])
    for weights in (interpolants.linear, interpolants.trigonometric):
        for latent in (interpolants.bridge, interpolants.bump):
            interpolant = sdegen.StochasticInterpolant(
                2.0, weights=weights, latent=latent
            )
            assert abs(interpolant.point(0.0, x0, x1, 5.0) - x0) < 1e-7
            assert abs(interpolant.point(1.0, x0, x1, 5.0) - x1) < 1e-7
            half = np.sqrt(0.5) if weights is interpolants.trigonometric else 0.5
            top = 1.0 if latent is interpolants.bridge else 2.0
            assert abs(interpolant.point(0.5, x0, x1, 1.0) - (4 * half + top)) < 1e-12
            h = 1e-6
            slope = interpolant.point(0.3 + h, x0, x1, 1.0) - interpolant.point(
                0.3 - h, x0, x1, 1.0
            )
            assert abs(interpolant.velocity(0.3, x0, x1, 1.0) - slope / (2 * h)) < 1e-6


REFUSED = {
    "one network for the velocity.*tuple of 3": lambda: sdegen.VelocityModel(
        (Affine(),) * 3, Sinh()
    ),
    "Sinh has no latent noise": lambda: sdegen.VelocityModel(
        Affine(), Sinh(), Affine()
    ),
    "noise of this model is unknown": lambda: sdegen.sample(
        KEY, sdegen.VelocityModel(Affine(), Sinh()), (4, 1), stochasticity=1.0
    ),
    r"must return an array of the shape of x, \(4, 1\), got \(4,\)": lambda: (
        sdegen.velocity_loss(
            sdegen.VelocityModel(lambda t, x, cond: x[:, 0], Sinh()),
            KEY,
            jnp.zeros((4, 1)),
        )
    ),
    r"batch of data of shape .* got shape \(4,\)": lambda: sdegen.velocity_loss(
        sdegen.VelocityModel(Affine(), Sinh()), KEY, jnp.zeros(4)
    ),
    "Sinh needs 0 <= t_min < t_max": lambda: Sinh(t_max=0.01),
}


@pytest.mark.parametrize("message", REFUSED)
def test_mistakes_are_answered_with_a_sentence(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_a_model_without_what_is_trained_knows_what_was_taken_out():
    for latent in (None, Affine()):
        path = Sinh() if latent is None else sdegen.StochasticInterpolant()
        model = sdegen.VelocityModel(Affine(), path, latent)
        empty = model.with_trained(None)
        assert not jax.tree.leaves((empty.network, empty.latent_network))
        assert empty.trainable == model.trainable
        assert eqx.tree_equal(empty.with_trained(model.trained), model)


def test_a_check_of_a_track_sees_its_ends_and_its_law():
    report = sdegen.check(sdegen.StochasticInterpolant())
    assert report.ok and {row.part for row in report.rows} == {"finite", "reversal"}
    assert max(row.residual for row in report.rows if row.part == "reversal") < 1e-6

    def late(t):  # half of the data are left at the other end
        return 1 - t / 2, t

    report = sdegen.check(sdegen.StochasticInterpolant(weights=late), parts=("finite",))
    assert [row.what for row in report.failed] == ["the point at t_max is x1"]

    @jax.custom_jvp
    def bump(t):
        return jnp.sqrt(t * (1 - t))

    bump.defjvp(lambda t, dt: (bump(*t), 0.5 * dt[0]))  # a wrong derivative
    wrong = sdegen.StochasticInterpolant(latent=bump)
    assert not sdegen.check(wrong, parts=("reversal",)).ok
