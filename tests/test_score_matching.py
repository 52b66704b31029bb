"""One loss: its minimiser is the posterior mean of its target, whatever the parts.

Score matching equals conditional score matching up to a known constant (Vincent 2011);
at a fixed time the best affine prediction of Gaussian data is known for every path and
kind, so the gradient of the loss must vanish there; published weights have published
values; and training times have the laws that they declare.
"""

import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import G1, G2, PROCESSES, process
from scipy import stats
from test_prediction import KINDS, SIGMA_DATA, Answer, Scales, cut, published, scales

import sdegen
from sdegen import prediction, weight
from sdegen.losses.times import AbstractTimes, FlowTime, LogitNormal, LogNormal, Uniform
from sdegen.processes.prediction import posterior_means
from sdegen.typing import Scalar, number

T = 0.3  # of the golden numbers of A2
J, C = 0.8926801483, 0.7638628400


class Always(AbstractTimes):
    """Every sample gets the same time."""

    t: Scalar = number(T)
    stratified: bool = eqx.field(default=False, static=True)

    def quantile(self, path, u):
        return jnp.broadcast_to(self.t, u.shape).astype(u.dtype)


# -- A2: score matching and conditional score matching ---------------------------------


@functools.cache
def line():
    """A grid on which trapezoids are exact for p_t and everything smooth times it."""
    x, step = np.linspace(-9, 9, 60001, retstep=True)
    alpha, sigma = (float(fn(T)) for fn in (process("VP").alpha, process("VP").sigma))
    p = np.asarray(G1.pdf(x, alpha, sigma))
    return x, p * step, np.asarray(G1.score(x, alpha, sigma))


@functools.cache
def plane():
    """(x0, z, weight) of the joint law, by Gauss-Hermite in each component of G1."""
    nodes, w = np.polynomial.hermite_e.hermegauss(60)
    w = w / w.sum()
    x0 = G1.mu[:, None] + G1.s[:, None] * nodes
    x0, z = x0[:, :, None], nodes
    return x0 + 0 * z, z + 0 * x0, G1.w[:, None, None] * w[:, None] * w


def conditional_target():
    """The library's target of a score, at x_t made by the library's path."""
    x0, z, w = plane()
    vp = process("VP")
    a, b = prediction.score.row(vp, jnp.asarray(T), 0.5)
    x_t = float(vp.alpha(T)) * x0 + float(vp.sigma(T)) * z
    return x_t, float(a) * x0 + float(b) * z, w


def test_the_constant_between_the_objectives_has_its_golden_value():
    _, p, score = line()
    _, target, w = conditional_target()
    fisher = np.sum(p * score**2)
    assert abs(fisher - J) < 1e-9
    assert abs(np.sum(w * target**2) - fisher - C) < 1e-9
    # E|target|^2 = 1 / sigma^2 in one dimension
    assert abs(1 / float(process("VP").sigma(T)) ** 2 - J - C) < 1e-9


@pytest.mark.parametrize("a, b", [(1.0, 0.0), (0.3, 0.7), (2.0, -1.0)])
def test_conditional_score_matching_is_score_matching_plus_a_constant(a, b):
    def model(x):
        return -a * x + b * np.sin(x)

    x, p, score = line()
    x_t, target, w = conditional_target()
    sm = np.sum(p * (score - model(x)) ** 2)
    csm = np.sum(w * (target - model(x_t)) ** 2)
    assert abs(csm - sm - C) < 1e-9
    # so the gradients in a and b agree: d/da and d/db of CSM - SM
    for feature in (lambda x: x, np.sin):
        csm_part = np.sum(w * feature(x_t) * (target - model(x_t)))
        sm_part = np.sum(p * feature(x) * (score - model(x)))
        assert abs(csm_part - sm_part) < 1e-9


# -- U5: the best affine prediction ----------------------------------------------------


class Affine(eqx.Module):
    """w x + c."""

    w: jax.Array
    c: jax.Array

    def __call__(self, t, x, cond):
        return self.w * x + self.c


def best_affine(path, t):
    """{kind: (w, c)} for Gaussian G2, and the variance of x_t: regression by hand."""
    at = scales(path, jnp.asarray([t]))
    alpha, sigma = at.alpha.item(), at.sigma.item()
    total = alpha**2 * G2.var + sigma**2
    # E[x0 | x] = m + alpha v / V (x - alpha m) and E[z | x] = sigma / V (x - alpha m)
    x = np.array([[0.0, 1.0]])
    x0 = G2.mean + alpha * G2.var / total * (x - alpha * G2.mean)
    z = sigma / total * (x - alpha * G2.mean)
    kinds = published(at, x, x0, z)
    law = {k: (p[0, 1] - p[0, 0], p[0, 0]) for k, p in kinds.items()}
    return law, alpha * G2.mean, total


BATCH, REPEATS = 1000, 64


def gradients(path, t, kind, w, c):
    """(d/dw, d/dc) of the library's loss on G2, one column per repeat.

    A repeat is a coordinate with its own w and c, of which the loss takes the mean.
    """
    data_key, key = jax.random.split(jax.random.key(11))
    x0 = G2.mean + G2.var**0.5 * jax.random.normal(data_key, (BATCH, REPEATS))

    def loss(network):
        d = sdegen.Denoiser(network, path, KINDS[kind], SIGMA_DATA, sdegen.raw_inputs)
        return REPEATS * sdegen.denoising_loss(d, key, x0, times=Always(t))

    network = Affine(jnp.full(REPEATS, w), jnp.full(REPEATS, c))
    grad = jax.grad(loss)(network)
    return np.stack([grad.w, grad.c])


def deviations(name, nudge):
    """{kind: gradient in standard errors}, with w off by `nudge` spreads of the target.

    The gradient is in the slope about the mean of x_t, and in the value there.
    """
    path = cut(name)
    # Where signal and noise balance, alpha^2 v = sigma^2, every kind has work to do.
    ts = np.linspace(float(path.t_min), float(path.t_max), 4000)
    logsnr = np.asarray(jax.vmap(path.logsnr)(jnp.asarray(ts)))
    t = np.interp(np.log(G2.var), -logsnr, ts)
    law, mean, total = best_affine(path, t)
    out = {}
    for kind, (w, c) in law.items():
        spread = (w**2 * total + residual(path, t, kind, total)) ** 0.5
        step = nudge * spread / total**0.5
        found = gradients(path, t, kind, w + step, c - step * mean)
        found[0] -= mean * found[1]
        out[kind] = found.mean(1) / (found.std(1, ddof=1) / REPEATS**0.5)
    return out


def residual(path, t, kind, total):
    """The variance of the target of `prediction` given x_t."""
    at = scales(path, jnp.asarray([t]))
    # At fixed x_t the ends are (x0 + sigma u, z - alpha u), u of variance v / total.
    step = published(at, np.zeros((1, 1)), at.sigma, -at.alpha)[kind].item()
    return step**2 * G2.var / total


@pytest.mark.parametrize("name", PROCESSES)
def test_the_loss_is_stationary_at_the_best_affine_prediction(name):
    out = deviations(name, 0.0)
    print(out)
    assert set(out) == set(KINDS)
    for kind, z in out.items():
        assert (np.abs(z) < 4.5).all(), kind
        assert np.abs(z).max() > 1e-3, kind  # an error bar that is one


@pytest.mark.parametrize("name", PROCESSES)
def test_a_slope_off_by_a_twentieth_would_be_seen(name):
    for kind, z in deviations(name, 0.05).items():
        assert z[0] > 8, kind


def test_the_smallest_loss_is_the_irreducible_part():
    # likelihood weight on the score: g^2 C at t = 0.3, not zero (A2).
    vp = process("VP")
    alpha, sigma = vp.alpha(T), vp.sigma(T)
    network = lambda t, x, cond: G1.score(x, alpha, sigma)  # noqa: E731
    d = sdegen.Denoiser(network, vp, prediction.score, inputs=sdegen.raw_inputs)

    @jax.jit
    def loss(key):
        x0 = G1.sample(jax.random.fold_in(key, 0), 4000)[:, None]
        return sdegen.denoising_loss(
            d, key, x0, times=Always(), weight=weight.likelihood
        )

    losses = np.array([loss(k) for k in jax.random.split(jax.random.key(0), 50)])
    error = losses.std(ddof=1) / np.sqrt(len(losses))
    expected = (0.1 + 19.9 * T) * C  # g^2 = beta
    print(losses.mean(), expected, error)
    assert abs(losses.mean() - expected) < 5 * error
    assert error < 0.02 * expected


def test_the_loss_is_a_mean_over_coordinates_and_samples():
    # A perfect memory of one point: x0 is known, so the loss of a shifted answer is the
    # square of the shift, on any shape of data.
    for shape in ((5, 1), (2, 4, 4, 3)):
        x0 = jnp.full(shape, 0.7)
        d = sdegen.Denoiser(Answer(x0 + 0.3), process("VP"), prediction.x0)
        loss = sdegen.denoising_loss(d, jax.random.key(0), x0)
        assert loss.shape == () and abs(float(loss) - 0.09) < 1e-12


# -- weights ---------------------------------------------------------------------------


class Converted(eqx.Module):
    """One fixed, wrong denoiser, expressed in a kind by its published formula."""

    path: sdegen.AbstractPath
    prediction: str = eqx.field(static=True)

    def __call__(self, t, x, cond):
        fns = self.path.alpha, self.path.sigma
        at = Scales(*(jax.vmap(f)(t)[:, None] for f in (*fns, *map(jax.grad, fns))))
        x0 = jnp.sin(2 * x) + 0.3
        return published(at, x, x0, (x - at.alpha * x0) / at.sigma)[self.prediction]


WEIGHTS = {
    "likelihood": weight.likelihood,
    "snr": weight.snr,
    "min-SNR": weight.MinSNR(),
    "edm": weight.edm,
}


@functools.cache
def losses(name):
    """{(weight, kind): loss} of one denoiser on one draw."""
    path = cut(name)
    x0 = G1.sample(jax.random.key(0), 64)[:, None]

    def loss(kind, fn):
        network = Converted(path, kind)
        d = sdegen.Denoiser(network, path, KINDS[kind], SIGMA_DATA, sdegen.raw_inputs)
        return float(sdegen.denoising_loss(d, jax.random.key(1), x0, weight=fn))

    every = WEIGHTS | {"uniform": weight.uniform}
    return {(w, kind): loss(kind, fn) for w, fn in every.items() for kind in KINDS}


@pytest.mark.parametrize("name", ["VP", "EDM", "RectifiedFlow"])
@pytest.mark.parametrize("which", WEIGHTS)
def test_a_weight_is_the_same_objective_in_every_kind(name, which):
    values = [losses(name)[which, kind] for kind in KINDS]
    np.testing.assert_allclose(values, values[0], rtol=1e-10)


def test_uniform_is_another_objective_in_every_kind():
    values = sorted(losses("VP")["uniform", kind] for kind in KINDS)
    assert (np.diff(values) > 1e-3 * np.array(values[1:])).all()


@pytest.mark.parametrize("name", PROCESSES)
def test_weights_have_their_published_values(name):
    path = cut(name)
    for fraction in (0.1, 0.5, 0.9):
        t = jnp.asarray(fraction * float(path.t_max) + 3e-5 * float(path.t_max))
        alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
        snr, s = (alpha / sigma) ** 2, sigma / alpha
        g2 = float(path.diffusion(t, jnp.zeros(()))) ** 2
        sd = SIGMA_DATA
        for fn, kind, value in [
            (weight.uniform, "v", 1.0),
            (weight.snr, "eps", 1.0),
            (weight.snr, "x0", snr),
            (weight.MinSNR(), "x0", min(snr, 5.0)),
            (weight.MinSNR(2.0), "eps", min(snr, 2.0) / snr),
            (weight.likelihood, "score", g2),
            (weight.likelihood, "eps", g2 / sigma**2),
            (weight.edm, "edm", 1.0),
            (weight.edm, "x0", (s**2 + sd**2) / (s * sd) ** 2),
        ]:
            found = float(fn(path, t, KINDS[kind], jnp.asarray(sd)))
            assert abs(found / value - 1) < 1e-11, (fn, kind)


def test_min_snr_on_v_is_that_of_its_paper():
    # Hang et al. 2023, section 3.4: min(SNR, gamma) / (SNR + 1), variance preserved.
    for t in (0.05, 0.3, 0.9):
        snr = float(jnp.exp(process("VP").logsnr(t)))
        found = weight.MinSNR()(process("VP"), jnp.asarray(t), prediction.v, 0.5)
        assert abs(float(found) / (min(snr, 5.0) / (snr + 1)) - 1) < 1e-12


def test_the_likelihood_weight_needs_a_diffusion():
    class OnlyAPath(sdegen.AbstractPath):
        t_min: Scalar = number(1e-3)
        t_max: Scalar = number(1.0)
        noise: sdegen.AbstractNoise = eqx.field(default_factory=sdegen.Gaussian)

        def alpha(self, t):
            return 1 - t

        def sigma(self, t):
            return 1.0 * t

    with pytest.raises(ValueError, match="needs a linear SDE, got the path OnlyAPath"):
        weight.likelihood(OnlyAPath(), jnp.asarray(0.5), prediction.x0, 0.5)


@pytest.mark.parametrize("s", [1e-3, 0.1, 1.0, 80.0])
def test_edm_has_unit_variances_and_unit_weight(s):
    # A16(b): data of standard deviation sigma_d, on the path of the paper.
    path, t, sd = sdegen.EDM(t_min=1e-4, t_max=100.0), jnp.asarray(s), 0.5
    c_noise, c_in = sdegen.edm_inputs(path, t, sd)
    assert abs(float(c_in) ** 2 * (s**2 + sd**2) - 1) < 1e-12
    assert abs(float(c_noise) - np.log(s) / 4) < 1e-12
    a, b = prediction.edm.row(path, t, sd)  # x0 and z are independent
    assert abs(float(a) ** 2 * sd**2 + float(b) ** 2 - 1) < 1e-12
    # D = c_skip x + c_out F, read off the solve.
    one, zero = jnp.ones(()), jnp.zeros(())
    c_skip = float(posterior_means((a, b), one, t, one, zero)[0])
    c_out = float(posterior_means((a, b), one, t, zero, one)[0])
    assert abs(float(weight.edm(path, t, prediction.x0, sd)) * c_out**2 - 1) < 1e-12
    # c_skip minimises c_out^2, the variance of x0 - c_skip (x0 + s z).

    def spread(c):
        return (1 - c) ** 2 * sd**2 + c**2 * s**2

    assert abs(spread(c_skip) / c_out**2 - 1) < 1e-9
    assert spread(c_skip) <= min(spread(c_skip + 1e-3), spread(c_skip - 1e-3))


# -- training times --------------------------------------------------------------------

N = 4000
INDEX = jnp.arange(N)


def draw(times, path, key=0):
    return np.asarray(times.draw(jax.random.key(key), path, INDEX, N))


def truth(times, path):
    """The declared law of `times` on `path`: (to, law), to(t) has law `law`."""
    low, width = float(path.t_min), float(path.t_max - path.t_min)
    if isinstance(times, FlowTime):
        first, last = (
            float(path.flow_time(path.t_min)),
            float(path.flow_time(path.t_max)),
        )
        tau = lambda t: np.asarray(jax.vmap(path.flow_time)(t))  # noqa: E731
        return (lambda t: (tau(t) - first) / (last - first)), stats.uniform
    if isinstance(times, Uniform):
        return (lambda t: (t - low) / width), stats.uniform
    law = stats.norm(float(times.mean), float(times.std))
    if isinstance(times, LogitNormal):
        return (lambda t: np.log((t - low) / (low + width - t))), law
    return (lambda t: -np.asarray(jax.vmap(path.logsnr)(t)) / 2), law


LAWS = {
    "uniform": Uniform,
    "flow time": FlowTime,
    "logit-normal": lambda **kw: LogitNormal(0.5, 1.5, **kw),
    "log-normal": lambda **kw: LogNormal(-0.4, 0.6, **kw),
}


@pytest.mark.parametrize("name", ["VP", "EDM", "RectifiedFlow"])
@pytest.mark.parametrize("kind", LAWS)
@pytest.mark.parametrize("stratified", [True, False])
def test_times_have_their_declared_law(kind, name, stratified):
    times, path = LAWS[kind](stratified=stratified), process(name)
    to, law = truth(times, path)
    assert stats.kstest(to(draw(times, path)), law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", ["VP", "VE", "Cosine", "LinearSDE"])
def test_log_normal_times_beyond_the_ends_become_the_ends(name):
    # Wide enough to leave the range on both sides; inside, the truncated normal law.
    path, times = process(name), LogNormal(0.0, 4.0, stratified=False)
    ts = draw(times, path)
    to, law = truth(times, path)
    ends_at = to(jnp.stack([path.t_min, path.t_max]))
    inside = (ts > float(path.t_min)) & (ts < float(path.t_max))
    outside = law.cdf(ends_at[0]), law.sf(ends_at[1])
    for at_end, p in zip(
        (ts == float(path.t_min), ts == float(path.t_max)), outside, strict=True
    ):
        assert abs(at_end.mean() - p) < 5 * np.sqrt(p * (1 - p) / N) + 1e-9
    assert (~inside).mean() == pytest.approx(sum(outside), abs=0.05)

    def cdf(x):
        return (law.cdf(x) - outside[0]) / (1 - sum(outside))

    assert stats.kstest(to(ts[inside]), cdf).pvalue > 1e-3


@pytest.mark.parametrize("kind", LAWS)
def test_stratified_times_put_one_draw_in_every_cell(kind):
    times, path = LAWS[kind](), process("VP")
    assert times.stratified  # the default
    to, law = truth(times, path)
    shifts = law.cdf(to(draw(times, path))) * N - np.arange(N)
    assert (shifts > 0).all() and (shifts < 1).all()
    np.testing.assert_allclose(shifts, shifts[0], atol=1e-7)  # one shared shift
    one = jnp.zeros(1, int)  # in a batch of one the shift is u itself
    alone = [times.draw(jax.random.key(i), path, one, 1) for i in range(40)]
    u = law.cdf(to(jnp.concatenate(alone)))
    assert stats.kstest(u, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("kind", LAWS)
def test_independent_times_do_not_depend_on_the_batch(kind):
    times, path = LAWS[kind](stratified=False), process("VP")
    ts = draw(times, path)
    larger = times.draw(jax.random.key(0), path, INDEX, 7 * N)
    np.testing.assert_array_equal(larger, ts)
    to, law = truth(times, path)
    u = law.cdf(to(ts))
    assert len(np.unique(ts)) == N
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 5 / np.sqrt(N)


@pytest.mark.parametrize("kind", LAWS)
@pytest.mark.parametrize("stratified", [True, False])
def test_a_sample_keeps_its_time_wherever_it_is_computed(kind, stratified):
    times, path = LAWS[kind](stratified=stratified), process("VP")
    shuffled = jax.random.permutation(jax.random.key(5), INDEX)
    part = times.draw(jax.random.key(0), path, shuffled, N)
    np.testing.assert_array_equal(part, draw(times, path)[shuffled])


@pytest.mark.parametrize("name", PROCESSES)
def test_times_stay_on_the_path_in_float32(name, float32):
    path = PROCESSES[name]()
    for stratified in (True, False):
        for times in (
            Uniform(stratified),
            FlowTime(stratified),
            LogitNormal(0.0, 9.0, stratified),
            LogNormal(0.0, 9.0, stratified),
        ):
            ts = np.asarray(times.draw(jax.random.key(0), path, INDEX, N))
            assert ts.dtype == np.float32
            assert ts.min() >= float(path.t_min) and ts.max() <= float(path.t_max)


# -- couplings -------------------------------------------------------------------------


def _couplings():
    """Every function and default module of the package that pairs two batches."""
    for name, found in vars(sdegen.coupling).items():
        if inspect.isclass(found) and issubclass(found, eqx.Module):
            found = found()
        known = list(inspect.signature(found).parameters) if callable(found) else []
        if known[:3] == ["key", "x0", "x1"] and name != "paired":
            yield name, found


COUPLINGS = dict(_couplings())


@pytest.mark.parametrize("name", COUPLINGS)
def test_couplings_keep_both_marginals(name):
    rows, couple = [], jax.jit(lambda *args: COUPLINGS[name](*args))
    for i in range(8):
        keys = jax.random.split(jax.random.key(i), 3)
        x0 = jnp.sin(jax.random.normal(keys[0], (64, 2)))
        x1 = jax.random.normal(keys[1], (64, 2))
        y0, y1, *_ = couple(keys[2], x0, x1)
        assert y0.shape == x0.shape and y1.shape == x1.shape
        again = couple(keys[2], x0, x1)
        np.testing.assert_array_equal(again[0], y0)  # a pure function
        np.testing.assert_array_equal(again[1], y1)
        rows.append((x0, y0, x1, y1))
    x0, y0, x1, y1 = (np.concatenate(part) for part in zip(*rows, strict=True))
    for before, after in ((x0, y0), (x1, y1)):
        for projection in ([1, 0], [0, 1], [1, 1], [1, -1]):
            pair = before @ projection, after @ projection
            assert stats.ks_2samp(*pair).pvalue > 1e-3


def test_the_loss_refuses_data_without_coordinates():
    d = sdegen.Denoiser(lambda t, x, cond: x, process("VP"))
    with pytest.raises(
        ValueError, match=r"at least one axis per sample, got shape \(5,"
    ):
        sdegen.denoising_loss(d, jax.random.key(0), jnp.ones(5))
