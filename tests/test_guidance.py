"""Guidance against exact scores: Gaussian mixtures with a label for each component."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.scipy.stats import norm
from oracle import G1, PROBES, PROCESSES, Mixture1D, process
from scipy.integrate import solve_ivp

import sdegen
from sdegen import nets
from sdegen.guidance import (
    Autoguided,
    ClassifierFree,
    ClassifierGuided,
    Interval,
    LabelDropout,
    MixtureOf,
    ProductOf,
    RewardGuided,
    Unconditional,
)
from sdegen.models.denoiser import PosteriorMean

PARTS = [Mixture1D([1.0], [m], [s]) for m, s in zip(G1.mu, G1.s, strict=True)]
"""G1 given the label: N(-1.5, 0.09) and N(1, 0.25)."""
NULL = jnp.zeros(2)
LABELS = jnp.eye(2)
X = jnp.linspace(-2.5, 2.5, 11)[:, None]


def scales(path, t):
    return path.alpha(t), path.sigma(t)


def under(label, n=11):
    return jnp.broadcast_to(LABELS[label], (n, 2))


class Labelled(eqx.Module):
    """E[x0 | x_t, label] for one-hot labels, zeros for none; tells `heard`."""

    path: sdegen.AbstractPath

    def __call__(self, t, x, cond):
        if heard is not None:
            jax.debug.callback(lambda _: heard.append(x.shape), x[0, 0])
        fs = (self.path.alpha, self.path.sigma)
        level = [jax.vmap(f)(t)[:, None, None] if jnp.ndim(t) else f(t) for f in fs]
        each = [law.denoise(x, *level) for law in (*PARTS, G1)]
        share = jnp.concatenate([cond, 1 - cond.sum(1, keepdims=True)], 1)
        mean = (share * jnp.concatenate(each, 1)).sum(1, keepdims=True)
        return mean.astype(x.dtype)


heard = None


@functools.cache
def labelled(name):
    path = process(name)
    return PosteriorMean(Labelled(path), path)


def log_label(path, t, x, label):
    """log p_t(label | x) by Bayes' rule from the components' densities."""
    alpha, sigma = scales(path, t)
    logs = [
        jnp.log(w) + norm.logpdf(x, alpha * m, jnp.sqrt((alpha * s) ** 2 + sigma**2))
        for w, m, s in zip(G1.w, G1.mu, G1.s, strict=True)
    ]
    return logs[label] - jax.nn.logsumexp(jnp.stack(logs), 0)


def log_density(path, t, x, label, power):
    """log of p_t(x | label)^power p_t(x)^(1 - power)."""
    alpha, sigma = scales(path, t)
    return power * jnp.log(PARTS[label].pdf(x, alpha, sigma)) + (1 - power) * jnp.log(
        G1.pdf(x, alpha, sigma)
    )


def times_of(path):
    return [path.time(l) for l in (-3.0, 0.0, 3.0)]


def close(a, b, tolerance=1e-10):
    a, b = np.asarray(a), np.asarray(b)
    error = float(np.max(np.abs(a - b) / (1 + np.abs(b))))
    print("error", error)
    assert error < tolerance


@pytest.mark.parametrize("label, name", [(0, "VP"), (1, "EDM")])
def test_a_conditional_score_is_the_score_plus_the_classifier(name, label):
    path = process(name)
    log_prob = lambda t, x, c: log_label(path, t, x[:, 0], label)  # noqa: E731
    guided = ClassifierGuided(Unconditional(labelled(name), NULL), log_prob)

    @jax.jit
    def both(t):
        exact = PARTS[label].score(X[:, 0], *scales(path, t))
        return guided.score(t, X), exact[:, None]

    for t in times_of(path):
        close(*both(t))


@pytest.mark.parametrize("name", ["SubVP", "VE", "Cosine", "RectifiedFlow"])
def test_classifier_free_guidance_is_the_score_of_the_powers(name):
    """And classifier guidance of weight 1 + w, for batches of times as well."""
    path, w = process(name), 1.7
    free = ClassifierFree(labelled(name), NULL, w)
    log_prob = lambda t, x, c: log_label(path, t, x[:, 0], 1)  # noqa: E731
    classifier = ClassifierGuided(Unconditional(labelled(name), NULL), log_prob, 1 + w)
    two = Autoguided(PARTS[1].denoiser(path), G1.denoiser(path), w)

    @jax.jit
    def scores(t):
        slope = jax.grad(functools.partial(log_density, path, t))
        exact = jax.vmap(lambda x: slope(x, 1, 1 + w))(X[:, 0])[:, None]
        every = jnp.full(len(X), t)
        found = [free.score(t, X, under(1)), free.score(every, X, under(1))]
        return exact, [*found, classifier.score(t, X), two.score(t, X)]

    for t in times_of(path):
        exact, found = scores(t)
        for score in found:
            close(score, exact)


@pytest.mark.parametrize("name", ["VE", "RectifiedFlow"])
def test_both_ends_agree_with_the_state(name):
    """x = alpha x0 + sigma z, whatever moves the ends, where alpha is 0 too."""
    path = process(name)
    reward = lambda x0, c: -((x0[:, 0] - 1) ** 2)  # noqa: E731
    log_prob = lambda t, x, c: log_label(path, t, x[:, 0], 1)  # noqa: E731
    free = Unconditional(labelled(name), NULL)
    methods = (
        RewardGuided(free, reward, 2.0),
        ClassifierGuided(free, log_prob, 2.0),
        ClassifierFree(labelled(name), NULL, 2.0, rescale=0.7),
    )

    @jax.jit
    def states(t):
        alpha, sigma = scales(path, t)
        ends = [guided.posterior_means(t, X, under(1)) for guided in methods]
        return [alpha * x0 + sigma * z for x0, z in ends]

    for t in (path.t_min, path.time(0.0), path.t_max):
        for x in states(t):
            close(x, X)


@pytest.mark.parametrize("name", ["SubVP", "RectifiedFlow"])
@pytest.mark.parametrize("w, law", [(0.0, PARTS[1]), (-1.0, G1)])
def test_without_weight_the_flow_keeps_every_quantile(name, w, law):
    """w = 0 is the conditional law, w = -1 the unconditional one: F_t(x_t) = F_0."""
    path = process(name)
    start = law.quantile(PROBES, *scales(path, path.t_max))[:, None]
    out = sampled(ClassifierFree(labelled(name), NULL, w), start)
    error = abs(law.cdf(out.x[:, 0], *scales(path, path.t_min)) - PROBES).max()
    print("quantiles kept to", error)
    assert error < 1e-8


def sampled(denoiser, start):
    return sdegen.sample(
        jax.random.key(0),
        denoiser,
        start.shape,
        start=start,
        solver=dfx.Tsit5(),
        grid=sdegen.Adaptive(1e-11, 1e-11),
        cond=under(1, len(start)),
    )


# -- which law is sampled: y ~ N(0, 1), x | y ~ N(y, 1/4), y = 1, w = 2 ----------------

MARGINAL = Mixture1D([1.0], [0.0], [1.25**0.5])
GIVEN = Mixture1D([1.0], [1.0], [0.5])


@functools.cache
def gaussian_guidance(name):
    """CFG between the noise levels of VP from t = 1 to 1e-6, on another process."""
    vp, wide = sdegen.VP(t_min=1e-6), PROCESSES[name]
    if name in ("EDM", "VE"):
        wide = functools.partial(
            wide,
            **{"t_max": 1e4}
            if name == "EDM"
            else {"sigma_max": 200.0, "sigma_min": 1e-4},
        )
    else:
        wide = functools.partial(wide, t_min=1e-9)
    t_max, t_min = (float(wide().time(vp.logsnr(t))) for t in (1.0, 1e-6))
    path = wide(t_min=t_min, t_max=t_max)
    return path, Autoguided(GIVEN.denoiser(path), MARGINAL.denoiser(path), 2.0)


@pytest.mark.parametrize("name", ["VE", "Cosine", "RectifiedFlow"])
def test_the_guided_flow_samples_its_own_law_and_not_the_tilted_one(name):
    """Published: N(1.398029, 0.010000); the tilted law is N(1.153846, 0.096154)."""
    path, guided = gaussian_guidance(name)
    ends = sampled(guided, path.sigma(path.t_max) * jnp.array([[0.0], [1.0]])).x[:, 0]
    mean, var = ends[0], (ends[1] - ends[0]) ** 2  # the flow of Gaussians is affine
    print(mean, var)
    assert abs(mean - 1.398029) < 1e-3 and abs(var - 0.010000) < 1e-3


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE"])
def test_the_guided_sde_samples_a_third_law(name):
    """Published: N(1.239999, 0.062480), by the moments of the linear SDE."""
    path, guided = gaussian_guidance(name)
    backward = sdegen.reverse(path, guided.sample_score)

    @jax.jit
    def moments(s, state):
        drift, slope = jax.jvp(
            lambda x: backward.drift(s, x[None])[0], (state[0],), (jnp.ones(()),)
        )
        noise = backward.diffusion(s, state[:1])
        return jnp.stack([drift, 2 * slope * state[1] + noise**2])

    start = [0.0, float(path.sigma(path.t_max)) ** 2]
    out = solve_ivp(moments, (0.0, 1.0), start, "LSODA", rtol=1e-7, atol=1e-9)
    mean, var = out.y[:, -1]
    print(mean, var)
    assert abs(mean - 1.239999) < 1e-3 and abs(var - 0.062480) < 1e-3


# -- other families --------------------------------------------------------------------


def test_a_mixture_of_conditions_is_the_law_without_condition():
    path, cond = process("VP"), (under(0), under(1))

    def log_density(t, x, cond):
        logs = [jnp.log(law.pdf(x[:, 0], *scales(path, t))) for law in PARTS]
        return jnp.sum(cond * jnp.stack(logs, 1), axis=1)

    mixed = MixtureOf(labelled("VP"), log_density, G1.w)

    @jax.jit
    def both(t):
        exact = G1.score(X[:, 0], *scales(path, t))
        return mixed.score(t, X, cond), exact[:, None]

    for t in times_of(path):
        close(*both(t))


def test_a_product_of_conditions_is_the_product_of_their_densities():
    path, cond = process("Cosine"), (under(0), under(1))
    weights = (1.5, -0.5)  # the second is kept away from
    product = ProductOf(labelled("Cosine"), NULL, weights)

    def log_density(x, level):
        free = jnp.log(G1.pdf(x, *level))
        logs = [jnp.log(law.pdf(x, *level)) for law in PARTS]
        return free + sum(
            w * (log - free) for w, log in zip(weights, logs, strict=True)
        )

    @jax.jit
    def both(t):
        exact = jax.vmap(jax.grad(log_density), (0, None))(X[:, 0], scales(path, t))
        return product.score(t, X, cond), exact[:, None]

    for t in times_of(path):
        close(*both(t))


def test_a_negative_condition_takes_the_place_of_none():
    path, w = process("VP"), 0.8
    guided = ClassifierFree(labelled("VP"), LABELS[0], w)

    @jax.jit
    def both(t):
        one, other = (law.score(X[:, 0], *scales(path, t)) for law in PARTS[::-1])
        return guided.score(t, X, under(1)), ((1 + w) * one - w * other)[:, None]

    close(*both(path.time(0.0)))


def test_guidance_acts_in_its_interval_alone():
    path = process("SubVP")
    guided = ClassifierFree(labelled("SubVP"), NULL, 2.0, Interval(0.5, 2.0))
    free = ClassifierFree(labelled("SubVP"), NULL, 2.0)
    bare = labelled("SubVP")
    x, cond = X[:4], under(1, 4)

    @jax.jit
    def three(ratio):
        t = jax.vmap(path.time)(-2 * jnp.log(ratio))
        return [denoiser(t, x, cond) for denoiser in (guided, free, bare)]

    found, inside, outside = map(np.asarray, three(jnp.array([0.4, 0.6, 1.9, 2.1])))
    close(found[[1, 2]], inside[[1, 2]])
    close(found[[0, 3]], outside[[0, 3]])
    assert np.abs(inside - outside).min() > 1e-3
    close(Interval(0.0)(path, path.t_max), 1.0)


def test_rescaling_gives_every_sample_the_deviation_of_the_conditional_one():
    path, cond = process("VP"), jnp.array([[1.0], [0.5]])
    mean = lambda t, x, c: x * c * jnp.array([1.0, 2.0, 3.0]) + c  # noqa: E731
    denoiser, x = PosteriorMean(mean, path), jnp.array([[0.3, -0.4, 1.0], [1.0, 2, -1]])
    wanted = np.std(denoiser(path.t_max, x, cond), axis=1)
    for share in (0.0, 0.5, 1.0):
        guided = ClassifierFree(denoiser, jnp.zeros(1), 3.0, rescale=share)
        size = np.std(guided(path.t_max, x, cond), axis=1)
        # without a condition this denoiser says 0: guidance multiplies by 1 + w = 4
        np.testing.assert_allclose(size, wanted * (share + 4 * (1 - share)))


@pytest.mark.parametrize("name", ["VP", "RectifiedFlow"])
def test_a_linear_reward_of_gaussian_data_gives_the_tilted_law(name):
    """exp(b x) N(m, s^2) is N(m + b s^2, s^2), here also by the denoised point."""
    path, b = process(name), 1.3
    guided = RewardGuided(GIVEN.denoiser(path), lambda x0, c: b * x0[:, 0])
    tilted = Mixture1D([1.0], [1.0 + b * 0.25], [0.5])

    @jax.jit
    def scores(t):
        exact = tilted.score(X[:, 0], *scales(path, t))[:, None]
        return exact, guided.score(t, X), guided.score(jnp.full(len(X), t), X)

    for t in times_of(path):
        exact, one, every = scores(t)
        close(one, exact)
        close(every, exact)


def test_guidance_goes_into_the_likelihood():
    x = jnp.array([[-1.2], [0.7], [1.4]])
    guided = ClassifierFree(labelled("VP"), NULL, 0.0)
    grid = sdegen.Adaptive(1e-9, 1e-9)
    out = sdegen.log_likelihood(guided, x, cond=under(1, 3), grid=grid)
    # the flow of a Gaussian is affine, from its own law at t_min to t_max
    path, (m,), (s,) = process("VP"), PARTS[1].mu, PARTS[1].s
    ends = [[float(v) for v in scales(path, t)] for t in (path.t_min, path.t_max)]
    stds = [np.hypot(alpha * s, sigma) for alpha, sigma in ends]
    (alpha, _), (last, sigma) = ends
    latent = last * m + stds[1] / stds[0] * (np.asarray(x)[:, 0] - alpha * m)
    exact = scipy.stats.norm.logpdf(latent, scale=sigma) + np.log(stds[1] / stds[0])
    np.testing.assert_allclose(out.value, exact, atol=1e-8)


# -- cost and mistakes -----------------------------------------------------------------


def calls_of(make, cond):
    """The batches that the network was called on in one evaluation."""
    global heard
    heard = []
    try:
        path = process("VP")
        fresh = PosteriorMean(Labelled(path), path)
        run = eqx.filter_jit(lambda d: d.posterior_means(path.time(0.0), X, cond))
        jax.block_until_ready(run(make(fresh)))
        jax.effects_barrier()
        return heard
    finally:
        heard = None


def test_guidance_is_one_call_of_the_network_however_many_conditions():
    n = len(X)
    assert calls_of(lambda d: ClassifierFree(d, NULL, 2.0), under(1)) == [(2 * n, 1)]
    two = (under(0), under(1))
    assert calls_of(lambda d: ProductOf(d, NULL, (1.0, 1.0)), two) == [(3 * n, 1)]
    one = lambda t, x, c: x[:, 0]  # noqa: E731
    assert calls_of(lambda d: MixtureOf(d, one, (0.5, 0.5)), two) == [(2 * n, 1)]
    reward = lambda x0, c: x0[:, 0]  # noqa: E731
    assert calls_of(lambda d: RewardGuided(d, reward), under(1)) == [(n, 1)]
    assert calls_of(lambda d: Unconditional(d, NULL), under(1)) == [(n, 1)]


def test_mistakes_are_answered_with_a_sentence():
    bare, path = labelled("VP"), process("VP")
    say = functools.partial(pytest.raises, ValueError)
    free = ClassifierFree(bare, NULL, 1.0)
    with say(match="built like the marker"):
        free(path.t_max, X, {"label": under(1)})
    with say(match="built like the marker"):
        free(path.t_max, X)
    with say(match=r"\(11, 2\), got \(11, 3\)"):
        free(path.t_max, X, jnp.zeros((11, 3)))
    for weight in (jnp.inf, jnp.nan):
        with say(match="must be finite"):
            ClassifierFree(bare, NULL, weight)
        with say(match="must be finite"):
            RewardGuided(bare, lambda x, c: x, weight)
        with say(match="must be finite"):
            ProductOf(bare, NULL, (1.0, weight))
    with say(match="one path"):
        Autoguided(bare, labelled("SubVP"), 1.0)
    with say(match="tuple of 2 conditions"):
        ProductOf(bare, NULL, (1.0, 1.0))(path.t_max, X, under(1))
    with say(match="positive"):
        MixtureOf(bare, lambda t, x, c: x, (1.0, -1.0))
    with say(match=r"shape \(11,\), got \(11, 1\)"):
        RewardGuided(Unconditional(bare, NULL), lambda x, c: x)(path.t_max, X)
    with say(match="Gaussian noise"):
        flow = sdegen.PoissonFlow()
        RewardGuided(PosteriorMean(lambda t, x, c: x, flow), lambda x, c: x)
    with say(match="0 <= low < high"):
        Interval(2.0, 1.0)
    with say(match="0 to 1"):
        LabelDropout(NULL, 1.5)
    for none in (None, ()):
        with say(match="null is the condition of one sample that stands for none"):
            LabelDropout(none)
    with say(match="arrays of numbers, got 'no'"):
        LabelDropout("no")
    with say(match="must be an integer as the labels are"):
        ClassifierFree(bare, 2.0)(path.t_max, X, np.arange(11))
    with say(match="built like the marker"):
        LabelDropout(NULL)(bare, jax.random.key(0), X)


def test_classes_vectors_and_images_go_through_one_tree():
    """A network shown channels beside x, guided: 2 x + 3 image + label."""
    x, w = jax.random.normal(jax.random.key(0), (5, 2, 2, 1)), 1.5
    image = jax.random.normal(jax.random.key(1), (5, 2, 2, 2))
    label = jnp.arange(5.0)[:, None]

    def network(t, both, vector):
        total = 2 * both[..., :1] + 3 * both[..., 1:].sum(-1, keepdims=True)
        return jnp.concatenate([total + vector[:, None, None], both[..., 1:]], axis=-1)

    beside = nets.ImageConditioned(network)
    kind = sdegen.prediction.x0
    denoiser = sdegen.Denoiser(beside, process("VP"), kind, inputs=sdegen.raw_inputs)
    null = {"image": jnp.zeros((2, 2, 2)), "vector": jnp.array([-1.0])}
    guided = ClassifierFree(denoiser, null, w)
    cond = {"image": image, "vector": label}
    given = 2 * x + 3 * image.sum(-1, keepdims=True) + label[:, None, None]
    close(guided(jnp.asarray(0.5), x, cond), given + w * (given - (2 * x - 1)))
    with pytest.raises(ValueError, match='dictionary with "image"'):
        beside(jnp.asarray(0.5), x, label)
    with pytest.raises(ValueError, match="batch, height and width"):
        beside(jnp.asarray(0.5), x, cond | {"image": image[:2]})


# -- training with and without the condition -------------------------------------------


def shown(denoiser, key, x0, cond, axis_name=None):
    """A loss that is the share of hidden conditions, by parts of the batch."""
    return jnp.mean(cond["a"].sum(1) == 0) + 10 * jnp.mean(cond["b"] == -1)


def test_dropout_hides_whole_conditions_of_its_share_on_any_mesh():
    null = {"a": np.zeros(2), "b": np.array(-1.0)}
    loss = LabelDropout(null, 0.2, shown)
    n, key = 4000, jax.random.key(3)
    cond = {"a": jnp.broadcast_to(LABELS[0], (n, 2)), "b": jnp.ones(n)}
    x0 = jnp.zeros((n, 1))
    share = loss(labelled("VP"), key, x0, cond) / 11
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / n) ** 0.5
    assert float(LabelDropout(null, 0.0, shown)(labelled("VP"), key, x0, cond)) == 0

    def part(x0, cond):
        return jax.lax.pmean(
            loss(labelled("VP"), key, x0, cond, axis_name="data"), "data"
        )

    mesh, rows = sdegen.mesh.data_mesh(8), jax.P("data")
    split = jax.shard_map(part, mesh=mesh, in_specs=(rows, rows), out_specs=jax.P())
    np.testing.assert_allclose(split(x0, cond), 11 * share)


@pytest.mark.usefixtures("float32")
def test_one_network_learns_the_law_with_and_without_its_label():
    pick = jax.random.bernoulli(jax.random.key(0), G1.w[1], (4000,)).astype(int)
    z = jax.random.normal(jax.random.key(1), (4000,))
    data = (jnp.asarray(G1.mu)[pick] + jnp.asarray(G1.s)[pick] * z)[:, None]
    network = nets.MLPConfig(width=32, depth=1)((1,), jax.random.key(0), cond_dim=2)
    fit = sdegen.fit(
        sdegen.Denoiser(network, sdegen.RectifiedFlow(), sigma_data=1.2),
        data,
        cond=jnp.eye(2)[pick],
        loss=LabelDropout(jnp.zeros(2), 0.3),
        steps=600,
        batch_size=256,
        ema=0.99,
        optimizer=sdegen.AdamW(learning_rate=1e-2),
        progress=False,
    )
    level = (0.5, 0.5)  # at t = 1/2
    for cond, law in zip(np.eye(3)[:, :2], (*PARTS, G1), strict=True):
        with jax.enable_x64(True):
            x = law.quantile(np.linspace(0.05, 0.95, 9), *level)
            x, exact = np.asarray(x), np.asarray(law.denoise(x, *level))
        cond = jnp.broadcast_to(jnp.asarray(cond, jnp.float32), (9, 2))
        x = jnp.asarray(x, jnp.float32)[:, None]
        error = np.abs(fit.model(jnp.asarray(0.5), x, cond)[:, 0] - exact).max()
        print(error)
        assert error < 0.15
