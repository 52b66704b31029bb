"""Inverse problems against exact posteriors of Gaussians and mixtures."""

import dataclasses
import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm
from oracle import G1, process

import sdegen
from sdegen import solvers
from sdegen.data.mixture import Mixture
from sdegen.guidance.inverse import (
    DDNM,
    DPS,
    TMPD,
    Measurement,
    PiGDM,
    RePaint,
    TwistedParticles,
)
from sdegen.mesh import batch_sharding, data_mesh
from sdegen.models.denoiser import PosteriorMean
from sdegen.runs import recorder
from sdegen.sampling.ancestral import renoise

MEAN, ROOT = (
    np.array([0.5, -1.0, 0.3]),
    np.array([[1.0, 0, 0], [0.7, 0.6, 0], [-0.4, 0.3, 0.5]]),
)
A = np.array([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0]])
Y, STD = np.array([0.8, -0.4]), 0.3


class Normal(eqx.Module):
    """E[x0 | x_t] of a normal law with these axes (columns) and variances."""

    path: sdegen.AbstractPath
    mean: jax.Array
    axes: jax.Array
    variances: jax.Array

    def __call__(self, t, x, cond):
        return jax.vmap(self.one, (0 if t.ndim else None, 0))(t, x)

    def one(self, t, x):
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        gain = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
        gap = (x - alpha * self.mean) @ self.axes
        return self.mean + self.axes @ (gain * gap)


def gaussian(path, root=ROOT):
    variances, axes = (jnp.asarray(a) for a in np.linalg.eigh(root @ root.T))
    return PosteriorMean(Normal(path, jnp.asarray(MEAN), axes, variances), path)


def posterior(root=ROOT, a=A, y=Y, std=STD):
    """Mean and covariance of x0 given y, and log p(y), by the normal equations."""
    cov = root @ root.T
    inside = a @ cov @ a.T + std**2 * np.eye(len(a))
    gain = cov @ a.T @ np.linalg.inv(inside)
    error = y - a @ MEAN
    evidence = -0.5 * (
        error @ np.linalg.solve(inside, error)
        + np.linalg.slogdet(2 * np.pi * inside)[1]
    )
    return MEAN + gain @ error, cov - gain @ a @ cov, evidence


def matrix(x):
    return jnp.asarray(A, x.dtype) @ x


MEASURED = Measurement(matrix, Y, STD)


def flow_law(denoiser, grid=100):
    """Mean and covariance that the flow ends with: it is affine for Gaussian data."""
    path = denoiser.path
    start = float(path.sigma(path.t_max)) * jnp.asarray(np.eye(4, 3, -1))
    options = {"start": start, "grid": sdegen.CosineGrid(grid), "solver": dfx.Heun()}
    end = sdegen.sample(jax.random.key(0), denoiser, (4, 3), **options).x
    end = np.asarray(end)
    slope = (end[1:] - end[0]).T
    return end[0], slope @ slope.T


ROUND = 0.8 * np.eye(3)
CASES = {
    "TMPD": (TMPD(iterations=2), ROOT),
    "PiGDM": (PiGDM(sigma_data=0.8), ROUND),
    "DDNM": (DDNM(sigma_data=0.8), ROUND),
}


@eqx.filter_jit
def guided_means(denoiser, t, x):
    """At one time for the batch, and at a time for each sample."""
    return denoiser(t, x), denoiser.posterior_means(jnp.full(len(x), t), x)


@pytest.mark.parametrize(
    "method, name",
    [("TMPD", "VP"), ("TMPD", "EDM"), ("PiGDM", "Cosine"), ("DDNM", "RectifiedFlow")],
)
def test_where_a_method_is_exact_its_denoised_point_is_the_posterior_mean(method, name):
    """E[x0 | x_t, y] from the joint Gaussian of (x0, x_t, y).

    Two measured numbers: two steps of conjugate gradients invert any matrix.
    """
    (rule, root), path = CASES[method], process(name)
    x = np.random.default_rng(1).normal(size=(5, 3))
    guided = rule.guide(gaussian(path, root), MEASURED)
    for l in (-3.0, 0.0, 4.0):
        t = path.time(l)
        alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
        both = np.concatenate([A, alpha * np.eye(3)])
        noise = np.diag([STD**2] * 2 + [sigma**2] * 3)
        cov = root @ root.T
        gain = cov @ both.T @ np.linalg.inv(both @ cov @ both.T + noise)
        seen = np.concatenate([np.broadcast_to(Y, (5, 2)), x], axis=1)
        exact = MEAN + (seen - both @ MEAN) @ gain.T
        together, (x0, z) = guided_means(guided, jnp.asarray(t), x)
        np.testing.assert_allclose(together, exact, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(x0, exact, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(alpha * x0 + sigma * z, x, atol=1e-9)


@pytest.mark.parametrize(
    "method, name",
    [("TMPD", "Cosine"), ("PiGDM", "RectifiedFlow"), ("DDNM", "SubVP")],
)
def test_there_its_flow_ends_at_the_posterior(method, name):
    rule, root = CASES[method]
    mean, cov = flow_law(rule.guide(gaussian(process(name), root), MEASURED))
    exact, exact_cov, _ = posterior(root)
    errors = np.abs(mean - exact).max(), np.abs(cov - exact_cov).max()
    print(errors)
    assert max(errors) < 5e-3


BIASED = {
    "DPS": (DPS(normalise=False), (0.084365, 0.052218)),
    "DDNM": (DDNM(), (0.044908, 0.015361)),
}


@pytest.mark.parametrize("method", BIASED)
def test_elsewhere_it_is_biased_by_what_the_log_says(method):
    rule, known = BIASED[method]
    mean, cov = flow_law(rule.guide(gaussian(process("VP")), MEASURED))
    exact, exact_cov, _ = posterior()
    bias = np.abs(mean - exact).max(), np.abs(cov - exact_cov).max()
    print(bias)
    np.testing.assert_allclose(bias, known, rtol=0.02)


# -- particles -------------------------------------------------------------------------


def gaussian_variance(path, ts, s):
    """Var[x0 | x_t] of data of deviation s, which makes a Gaussian chain exact."""
    alpha, sigma = (jax.vmap(f)(ts) for f in (path.alpha, path.sigma))
    values = (s * sigma) ** 2 / ((alpha * s) ** 2 + sigma**2)
    return solvers.Variance(jnp.log1p(alpha / sigma), values)


@functools.cache
def runs(particles, name="VP", repeats=64):
    """Independent runs for the posterior of isotropic data: an exact chain."""
    path = process(name)
    ts = sdegen.LogSNRGrid(12)(path)
    temper = sdegen.gaussian_temper(STD, 0.8)

    @jax.jit
    def many(keys):
        return jax.vmap(
            lambda key: sdegen.sample_tilted(
                key,
                gaussian(path, ROUND),
                MEASURED.log_prob,
                (particles, 3),
                grid=ts,
                temper=temper,
                variance=gaussian_variance(path, ts, 0.8),
            )
        )(keys)

    return many(jax.random.split(jax.random.key(7), repeats))


@jax.jit
def moments_of(out):
    """Mean and second moments of every run."""
    mean = jax.vmap(lambda o: o.mean())(out)
    return mean, jax.vmap(lambda o: o.mean(lambda x: x[:, :, None] * x[:, None]))(out)


def errors_of(out, exact):
    """Squared errors of mean and covariance of every run."""
    mean, outer = map(np.asarray, moments_of(out))
    cov = outer - mean[:, :, None] * mean[:, None]
    return ((mean - exact[0]) ** 2).sum(1), ((cov - exact[1]) ** 2).sum((1, 2))


@pytest.mark.parametrize("name, n", [("VP", 1024), ("RectifiedFlow", 256)])
def test_the_evidence_of_particles_is_the_exact_one(name, n):
    """Within 4 standard errors; Z itself, not its logarithm, is unbiased."""
    out, (_, _, exact) = runs(n, name), posterior(ROUND)
    ratio = np.exp(np.asarray(out.log_evidence) - exact)
    error = ratio.std(ddof=1) / len(ratio) ** 0.5
    print(ratio.mean(), error, ratio.std(), out.log_evidence_error.mean())
    assert abs(ratio.mean() - 1) < 4 * error
    assert error < 0.03
    # the error bar of one run, from its family tree alone
    bar = float(np.sqrt(np.mean(np.asarray(out.log_evidence_error) ** 2)))
    assert 0.5 * ratio.std() < bar < 2.5 * ratio.std()
    assert bool(out.ok.all()) and out.evaluations[0] == 13
    assert ((out.ess > 1) & (out.ess <= n + 1e-6)).all()


def test_the_error_of_particles_falls_as_their_root():
    exact = posterior(ROUND)
    sizes = np.array([64, 1024])
    rows = np.array(
        [[np.sqrt(e.mean()) for e in errors_of(runs(n), exact)] for n in sizes.tolist()]
    )
    slopes = np.polyfit(np.log(sizes), np.log(rows), 1)[0]
    print(rows, slopes)
    assert (np.abs(slopes + 0.5) < 0.1).all()
    # and there is nothing else: the mean over runs is right to its own error
    mean = np.asarray(moments_of(runs(1024))[0])
    bar = mean.std(0, ddof=1) / len(mean) ** 0.5
    assert (np.abs(mean.mean(0) - exact[0]) < 4.5 * bar).all()


def test_tilting_a_mixture_towards_a_label_gives_the_powers_of_its_densities():
    """p(x) p(label | x)^gamma on the line, by quadrature; data with two modes."""
    law = Mixture([0.3, 0.7], [[-1.5], [1.0]], [0.3, 0.5])
    path, gamma = process("VP"), 0.7

    def log_label(x):
        logs = jnp.log(G1.w) + norm.logpdf(x, G1.mu, G1.s)
        return gamma * jax.nn.log_softmax(logs, axis=-1)[..., 0]

    out = sdegen.sample_tilted(
        jax.random.key(0),
        law.denoiser(path),
        lambda x0, cond: log_label(x0),
        (2000, 1),
        grid=sdegen.LogSNRGrid(100),
    )
    x = np.linspace(-6, 6, 4001)
    density = G1.pdf(jnp.asarray(x)) * np.exp(log_label(x[:, None]))
    exact = float(np.trapezoid(density, x))
    below = float(np.trapezoid(np.where(x < -0.5, density, 0), x)) / exact
    share = float(out.mean(lambda x: jnp.where(x[:, 0] < -0.5, 1.0, 0.0)))
    error, n = float(out.log_evidence_error), float(out.ess[-1])
    print(out.log_evidence, np.log(exact), error, share, below, n)
    assert abs(out.log_evidence - np.log(exact)) < 4 * error
    assert abs(share - below) < 4 * (below * (1 - below) / n) ** 0.5
    drawn = out.draw(jax.random.key(1), 2000)
    assert abs(np.mean(drawn < -0.5) - below) < 4 * (below * (1 - below) / n) ** 0.5


def test_the_report_shows_three_laws_and_particles_that_close_the_gap():
    given, free = Mixture([1], [[1.0]], [0.5]), Mixture([1], [[0.0]], [1.25**0.5])
    rows = sdegen.tilt_report(
        jax.random.key(0),
        given,
        free,
        2.0,
        sdegen.VP(t_min=1e-5),
        particles=(50, 3000),
        samples=4000,
        steps=60,
    )
    rows = {row["distribution"]: row for row in rows}
    print(recorder.table(list(rows.values())))
    # published, for SDE and flow: N(1.239999, .062480), N(1.398029, .010000)
    for law, mean, var, tolerance in (
        ("tilted", 1.153846, 0.096154, 1e-4),
        ("guided flow", 1.398029, 0.010000, 0.01),
        ("guided SDE", 1.239999, 0.062480, 0.02),
        ("3000 particles", 1.153846, 0.096154, 0.03),
    ):
        assert abs(rows[law]["mean"] - mean) < tolerance
        assert abs(rows[law]["std"] - var**0.5) < tolerance
    assert rows["3000 particles"]["W1"] < rows["50 particles"]["W1"]
    assert rows["3000 particles"]["W1"] < 0.03 < 0.05 < rows["guided SDE"]["W1"]
    found = rows["3000 particles"]
    assert abs(found["log Z"] - 2.0547591) < 4 * found["+-"] + 0.01  # 60 steps


def test_particles_are_the_same_on_eight_devices():
    """Sample i draws from fold_in(key, i): the same numbers, ancestors included."""
    path, batch = process("VP"), batch_sharding(data_mesh(8))

    def run(sharding):
        return sdegen.sample_tilted(
            jax.random.key(2),
            gaussian(path),
            MEASURED.log_prob,
            (64, 3),
            grid=8,
            temper=sdegen.gaussian_temper(STD, 1.0),
            sharding=sharding,
        )

    one, eight = run(None), run(batch)
    assert len(eight.x.sharding.device_set) == 8
    assert int(one.resampled) > 0
    np.testing.assert_allclose(eight.x, one.x, atol=1e-9)
    np.testing.assert_allclose(eight.log_weights, one.log_weights, atol=1e-9)
    np.testing.assert_allclose(eight.log_evidence, one.log_evidence, atol=1e-9)


def test_every_image_has_particles_of_its_own():
    """Posteriors of three measurements at once, one draw from each, many times."""
    y = jnp.array([[0.8, -0.4], [0.0, 1.0], [-1.0, 0.5]])
    method = TwistedParticles(particles=64, sigma_data=0.8)
    many = Measurement(matrix, jnp.tile(y, (100, 1)), STD)
    out = method(
        jax.random.key(0), gaussian(process("VP"), ROUND), many, (300, 3), grid=24
    )
    for i in range(3):
        mean, cov, _ = posterior(ROUND, y=np.asarray(y[i]))
        drawn = np.asarray(out.x)[i::3]
        bar = np.sqrt(np.diag(cov) / len(drawn))
        print((drawn.mean(0) - mean) / bar)
        assert (np.abs(drawn.mean(0) - mean) < 4 * bar + 0.03).all()
    assert out.evaluations == 25 and bool(out.ok.all())


def test_a_lost_particle_has_no_weight_and_spoils_no_other():
    def reward(x, cond):
        return jnp.where(x[:, 0] > 0.5, jnp.nan, -x[:, 1])

    out = sdegen.sample_tilted(
        jax.random.key(1), gaussian(process("VP")), reward, (64, 3), grid=8
    )
    weights = np.exp(out.log_weights)
    assert (weights[out.x[:, 0] > 0.5] == 0).all() and abs(weights.sum() - 1) < 1e-9
    assert np.isfinite(out.log_evidence) and np.isfinite(out.mean()).all()
    spoilt = dataclasses.replace(out, x=jnp.where(weights[:, None] > 0, out.x, jnp.nan))
    assert np.isfinite(spoilt.mean()).all()


def test_complex_measurements_are_their_real_and_imaginary_parts():
    """log p(y | x0) of a Fourier operator, against NumPy."""
    x, std = np.random.default_rng(0).normal(size=(5, 4)), 0.3
    y = np.fft.rfft(x[0]) + (0.1 - 0.2j)
    fourier = Measurement(jnp.fft.rfft, y, std)
    fourier.check(x.shape)
    gap = np.fft.rfft(x) - y
    parts = np.concatenate([gap.real, gap.imag], axis=1)
    expected = norm.logpdf(parts, scale=std).sum(axis=1)
    np.testing.assert_allclose(fourier.log_prob(jnp.asarray(x)), expected, rtol=1e-10)
    with pytest.raises(ValueError, match="A complex number is two in a last axis"):
        Measurement(jnp.fft.rfft, y.real, std).check(x.shape)


# -- replacement, and what is not linear -----------------------------------------------


def known_part(x):
    return x * jnp.array([1.0, 1.0, 0.0])


@pytest.mark.parametrize("name", ["VP", "EDM", "Cosine", "RectifiedFlow"])
def test_noise_is_put_back_to_the_marginals_of_the_path(name):
    path = process(name)
    t, s = path.time(-2.0), path.time(1.0)
    (a0, s0), (a1, s1) = path.scales(t), path.scales(s)
    keep, more = renoise(path, s, t)
    np.testing.assert_allclose((keep * a1, jnp.hypot(keep * s1, more)), (a0, s0))


def test_repaint_keeps_what_is_known_and_resampling_brings_the_rest_nearer():
    y = np.array([0.9, -0.2, 0.0])
    mask = Measurement(known_part, y, 0.0)
    exact, cov, _ = posterior(a=np.eye(3)[:2], y=y[:2], std=1e-9)
    path, errors = process("VP"), {}
    for resamples in (1, 12):
        out = RePaint(resamples)(
            jax.random.key(0), gaussian(path), mask, (2000, 3), grid=40
        )
        x = np.asarray(out.x)
        assert np.abs(x[:, :2] - y[:2]).max() < 1e-12  # std is 0: to rounding
        errors[resamples] = abs(x[:, 2].mean() - exact[2])
        assert out.evaluations == 40 * resamples and bool(out.ok.all())
    print(errors, exact[2], cov[2, 2] ** 0.5)
    assert errors[12] < errors[1] / 2


def test_repaint_takes_a_start_keeps_its_trajectory_and_denoises():
    path, mask = process("VP"), Measurement(known_part, np.zeros(3), 0.0)
    start = jnp.tile(jnp.array([[3.0, 0.0, -1.0]]), (4, 1))
    times = sdegen.LogSNRGrid(6)(path)
    options = {"grid": times, "start": start}
    run = functools.partial(RePaint(2), jax.random.key(0), gaussian(path), mask, (4, 3))
    out = run(trajectory=True, **options)
    assert out.trajectory.shape == (7, 4, 3) and (out.times == times).all()
    np.testing.assert_allclose(out.trajectory[0], start)
    end = out.trajectory[-1]  # what is known has its noise, unlike in x
    np.testing.assert_allclose(out.x, end.at[:, :2].set(0.0), atol=1e-12)
    assert 0 < np.abs(end[:, :2]).max() < 6 * path.sigma(path.t_min)
    # on four devices, and denoised at the end
    clean = run(denoise=True, **options, sharding=batch_sharding(data_mesh(4)))
    expected = gaussian(path)(path.t_min, end).at[:, :2].set(0.0)
    np.testing.assert_allclose(clean.x, expected, rtol=1e-7, atol=1e-12)
    assert (out.evaluations, clean.evaluations) == (12, 13)


def test_an_operator_may_be_any_function():
    """y = |x|^2 of a Gaussian in the plane: the posterior is a ring, by quadrature."""
    ring = Measurement(lambda x: jnp.sum(x**2), jnp.array(4.0), 0.3)
    law = Mixture([1.0], [[1.0, 0.0]], [1.0])
    axis = np.linspace(-5, 5, 801)
    u, v = np.meshgrid(axis, axis)
    density = np.exp(-0.5 * ((u - 1) ** 2 + v**2) - 0.5 * (u**2 + v**2 - 4) ** 2 / 0.09)
    mean = float((density * u).sum() / density.sum())
    method = TwistedParticles(2000, temper=sdegen.share_temper(16.0))
    for rule in (method, PiGDM()):
        out = rule(
            jax.random.key(0), law.denoiser(process("VP")), ring, (1000, 2), grid=60
        )
        size = np.sum(np.asarray(out.x) ** 2, axis=1)
        found = float(out.x[:, 0].mean())
        print(type(rule).__name__, size.mean(), size.std(), found, mean)
        assert abs(size.mean() - 4) < 0.6 and bool(out.ok.all())
        if rule is method:
            assert abs(found - mean) < 0.35  # three deviations from run to run


# -- cost and mistakes -----------------------------------------------------------------


def test_an_evaluation_costs_one_call_and_its_products():
    """Products with the network's transposed Jacobian, counted in the program."""
    path = process("VP")

    @jax.custom_vjp
    def network(x):
        return 0.5 * x

    def back(_, g):
        jax.debug.callback(lambda _: counts.append("product"), g[0, 0])
        return (0.5 * g,)

    network.defvjp(lambda x: (network(x), None), back)

    def mean(t, x, cond):
        jax.debug.callback(lambda _: counts.append("call"), x[0, 0])
        return network(x)

    denoiser, x = PosteriorMean(mean, path), jnp.ones((2, 3))
    reward = sdegen.guidance.RewardGuided(denoiser, MEASURED.log_prob)
    for rule, products in (
        (reward, 1),
        (DPS(), 1),
        (PiGDM(), 1),
        (TMPD(iterations=3), 4),
        (TMPD(iterations=0), 2),
        (DDNM(), 0),
    ):
        guided = rule if rule is reward else rule.guide(denoiser, MEASURED)
        counts = []
        run = eqx.filter_jit(lambda d, t: d.posterior_means(t, x))
        jax.block_until_ready(run(guided, path.time(0.0)))
        jax.effects_barrier()
        assert (counts.count("call"), counts.count("product")) == (1, products)


def test_mistakes_are_answered_with_a_sentence():
    model, key = gaussian(process("VP")), jax.random.key(0)
    say = functools.partial(pytest.raises, ValueError)
    for method in (DPS(), DDNM(), RePaint(), TwistedParticles()):
        with say(match=r"to \(2,\), but y has the shape \(3,\)"):
            method(key, model, Measurement(matrix, jnp.zeros(3)), (4, 3))
    with say(match=r"one sample of shape \(5,\)"):
        DPS()(key, model, MEASURED, (4, 5))
    with say(match="could not be applied"):
        MEASURED.check((4, 7))
    with say(match="finite"):
        Measurement(matrix, jnp.array([jnp.nan, 0.0]))
    with say(match="finite"):
        Measurement(matrix, Y, -1.0)
    for method in (DPS(), TMPD(), TwistedParticles()):
        with say(match="std is 0"):
            method(key, model, Measurement(matrix, Y, 0.0), (4, 3))
    with say(match="linear operator"):
        DDNM()(key, model, Measurement(lambda x: x**2, jnp.zeros(3)), (4, 3))
    with say(match="must be a mask"):
        RePaint()(key, model, MEASURED, (4, 3))
    mask = Measurement(known_part, np.zeros(3))
    with say(match=r"start must have the shape \(4, 3\)"):
        RePaint()(key, model, mask, (4, 3), start=jnp.zeros((2, 3)))
    with say(match="RePaint takes its steps on a fixed grid"):
        RePaint()(key, model, mask, (4, 3), grid=sdegen.Adaptive())
    with say(match="keeps no trajectory"):
        TwistedParticles()(key, model, MEASURED, (4, 3), trajectory=True)
    with say(match="must be finite"):
        PiGDM(weight=jnp.inf)
    run = functools.partial(sdegen.sample_tilted, key, model)
    with say(match="two of them or more"):
        run(MEASURED.log_prob, (1, 3))
    with say(match="fixed grid"):
        run(MEASURED.log_prob, (4, 3), grid=sdegen.Adaptive())
    with say(match="above 0"):
        run(MEASURED.log_prob, (4, 3), stochasticity=0.0)
    with say(match=r"shape \(4,\), got \(4, 3\)"):
        run(lambda x, c: x, (4, 3))
    with say(match="no finite mass"):
        narrow, wide = Mixture([1], [[0.0]], [0.5]), Mixture([1], [[0.0]], [2.0])
        sdegen.tilt_report(key, wide, narrow, 3.0, sdegen.VP())
