"""Corruption systems, against other programs, closed forms and full enumeration.

Laws over sequences of tokens are enumerated in NumPy from the `moves` that the samplers
draw from, and the samplers are held to them by counting.
"""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import G1, process
from scipy.ndimage import gaussian_filter

import sdegen
from sdegen import corruption
from sdegen.nets.transformer import TokenTransformer, Transformer

KEY = jax.random.key(5)
MANY = 20_000


loss = eqx.filter_jit(corruption.restoration_loss)


def rms(x):
    return float(np.sqrt(np.mean(np.asarray(x) ** 2)))


# -- hot -------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_hot_is_ddim_draw_by_draw(eta):
    path = process("VP")
    denoiser = G1.denoiser(path)
    times = jnp.linspace(1.0, 1e-3, 13) ** 2 * (1 - 1e-3) + 1e-3
    ddim = sdegen.sample(
        KEY,
        denoiser,
        (6, 1),
        solver=sdegen.solvers.DDIM(),
        grid=times,
        stochasticity=eta,
    )
    chain = sdegen.sample(
        KEY,
        corruption.Restorer(denoiser, corruption.Gaussian(path, eta)),
        (6, 1),
        grid=times,
    )
    assert chain.evaluations == ddim.evaluations == 12
    assert abs(chain.x - ddim.x).max() < 1e-12
    assert np.unique(chain.x).size == 6


@pytest.mark.parametrize("name", ["VP", "VE", "RectifiedFlow"])
def test_the_steps_of_hot_keep_the_marginals(name):
    path = process(name)
    share = jnp.array([[0.0, 0.01], [0.1, 0.4], [0.5, 0.9], [0.2, 1.0]])
    s, t = (path.t_min + share * (path.t_max - path.t_min)).T
    every = jax.jit(jax.vmap(lambda h, s, t: h.coefficients(s, t), (None, 0, 0)))
    scales = jax.jit(jax.vmap(lambda p, t: (p.alpha(t), p.sigma(t)), (None, 0)))
    (a_s, sigma_s), (a_t, sigma_t) = np.asarray([scales(path, u) for u in (s, t)])
    for eta in (0.0, 0.6, 1.0):
        gamma, kappa, v = np.asarray(every(corruption.Gaussian(path, eta), s, t))
        error = (kappa * sigma_t) ** 2 + v**2 - sigma_s**2
        assert (abs(error) < 2e-14 * sigma_s**2).all()
        assert (abs(kappa * a_t + gamma - a_s) < 1e-14).all()
    if name == "VP":  # DDPM: v = (sigma_s / sigma_t) sqrt(1 - alpha_t^2 / alpha_s^2)
        assert np.allclose(v, sigma_s / sigma_t * np.sqrt(1 - (a_t / a_s) ** 2))


def test_hot_starts_at_the_largest_noise_and_trains_on_its_path():
    hot = corruption.Gaussian(process("EDM"))
    start = np.asarray(hot.prior(KEY, (100_000,)))
    assert abs(start.std() / 80 - 1) < 5 / np.sqrt(2 * start.size)
    x0 = np.ones((MANY, 2))
    x = np.asarray(corruption.corrupt(KEY, hot, 3.0, x0))
    assert abs(x.mean() - 1) < 5 * 3 / np.sqrt(x.size)
    assert abs(x.std() / 3 - 1) < 5 / np.sqrt(2 * x.size)
    # the loss of a restorer that is always wrong by 2 is 4
    wrong = corruption.Restorer(lambda t, x, cond: jnp.full_like(x, 3.0), hot)
    assert np.isclose(loss(wrong, KEY, jnp.asarray(x0[:8])), 4.0)


# -- cold ------------------------------------------------------------------------------


def both(restore, degrade, x0, steps):
    """The ends of the improved and of the naive chain from F_1(x0)."""
    ends = []
    for keep in (1.0, 0.0):
        model = corruption.Restorer(restore, corruption.Cold(degrade, keep=keep))
        start = degrade(1.0, x0)
        ends.append(sdegen.sample(KEY, model, x0.shape, grid=steps, start=start).x)
    return [np.asarray(end) for end in ends]


def test_along_a_fixed_direction_any_restorer_will_do():
    x0, e = jnp.array([[0.3, -1.2, 2.0]]), jnp.array([1.0, -2.0, 5.0])
    improved, naive = both(
        lambda t, x, cond: jnp.sin(x), lambda t, x: x + t * e, x0, steps=50
    )
    assert abs(improved - x0).max() < 1e-12
    assert abs(naive - x0).max() > 0.1


def test_a_biased_restorer_of_a_diagonal_blur():
    x0, rates = jnp.array([[0.5] * 64]), jnp.linspace(0, 3, 64)
    blur = lambda t, x: jnp.exp(-rates * t) * x  # noqa: E731
    for bias in (0.0, 0.1):
        shifted = eqx.Partial(lambda bias, t, x, cond: x0 + bias, jnp.array(bias))
        improved, naive = both(shifted, blur, x0, steps=50)
        assert abs(rms(naive - x0) - bias) < 1e-12
        assert abs(rms(improved - x0) - 0.729 * bias) < 5e-5
        assert bias or abs(improved - x0).max() < 1e-12


def test_the_improved_sampler_is_not_always_the_better_one():
    x0, far = jnp.array([[0.0]]), 3.7
    fade = corruption.Inpaint(jnp.ones(1), far)
    restore = lambda t, x, cond: x0 + 0.2 * (x - x0)  # noqa: E731
    improved, naive = both(restore, fade, x0, steps=50)
    growth = 1.004**50  # e' = e (1 + .2 / K) - far / K, from e = far
    assert abs(improved[0, 0] - far * (growth - (growth - 1) / 0.2)) < 1e-12
    assert abs(abs(improved[0, 0]) - 0.43) < 5e-3
    assert abs(abs(naive[0, 0]) - 0.02) < 5e-3


def test_with_noise_every_keep_has_the_law_of_the_corruption():
    x0, shrink = np.full((MANY, 1), 0.4), lambda t, x: x * (1 - t)
    right = lambda t, x, cond: jnp.full_like(x, 0.4)  # noqa: E731
    for keep in (0.0, 0.6, 1.0):
        system = corruption.Cold(shrink, noise=0.3, keep=keep)
        start, model = (
            corruption.corrupt(KEY, system, 1.0, x0),
            corruption.Restorer(right, system),
        )
        out = sdegen.sample(KEY, model, x0.shape, grid=4, start=start, trajectory=True)
        out = jax.tree.map(np.asarray, out)
        for t, x in zip(out.times[:-1], out.trajectory[:-1], strict=True):
            assert abs(x.mean() - 0.4 * (1 - t)) < 5 * 0.3 / np.sqrt(MANY)
            assert abs(x.std() / 0.3 - 1) < 5 / np.sqrt(2 * MANY)
        # the last step adds nothing
        assert abs(out.x.std() - 0.3 * keep) < 5 * 0.3 / np.sqrt(2 * MANY)


IMAGE = jnp.asarray(np.random.default_rng(0).normal(size=(16, 12, 2)))


def test_widths_of_blurs_add_in_their_squares():
    one, two = (
        corruption.dissipate(corruption.dissipate(IMAGE, 1.5), 2.0),
        corruption.dissipate(IMAGE, 2.5),
    )
    assert abs(one - two).max() < 1e-12
    assert abs(one - corruption.dissipate(IMAGE, 3.5)).max() > 0.01
    assert abs(two.mean((0, 1)) - IMAGE.mean((0, 1))).max() < 1e-14


def test_a_blur_is_the_gaussian_filter_with_mirrored_borders():
    known = gaussian_filter(np.asarray(IMAGE), (2, 2, 0), mode="reflect", truncate=12)
    assert abs(corruption.Blur(4.0)(jnp.array(0.5), IMAGE) - known).max() < 1e-8
    line = corruption.dissipate(IMAGE[:, :, 0], 2.0, axes=(-1,))
    known = gaussian_filter(
        np.asarray(IMAGE[:, :, 0]), (0, 2), mode="reflect", truncate=12
    )
    assert abs(line - known).max() < 1e-8


def test_downsampling_averages_blocks_and_mixes_the_levels():
    degrade = corruption.Downsample(4)
    blocks = np.asarray(IMAGE).reshape(4, 4, 3, 4, 2).mean((1, 3))
    quarter = blocks.repeat(4, 0).repeat(4, 1)
    blocks = np.asarray(IMAGE).reshape(8, 2, 6, 2, 2).mean((1, 3))
    half = blocks.repeat(2, 0).repeat(2, 1)
    for t, known in ((1.0, quarter), (0.5, half), (0.75, (half + quarter) / 2)):
        assert abs(degrade(jnp.array(t), IMAGE) - known).max() < 1e-14


def test_inpainting_fades_what_is_marked():
    mark = jnp.zeros((16, 12, 1)).at[4:8].set(1.0)
    x = corruption.Inpaint(mark, -1.0)(jnp.array(1.0), IMAGE)
    assert (x[4:8] == -1).all() and (x[:4] == IMAGE[:4]).all()


@pytest.mark.parametrize(
    "degrade",
    [
        corruption.Blur,
        corruption.Downsample,
        lambda: corruption.Inpaint(jnp.ones((16, 12, 1))),
    ],
    ids=["blur", "downsample", "inpaint"],
)
def test_nothing_is_degraded_at_time_zero(degrade, float32):
    image = IMAGE.astype(jnp.float32)
    x = corruption.corrupt(KEY, corruption.Cold(degrade()), 0.0, image[None])
    assert x.dtype == jnp.float32 and abs(x[0] - image).max() < 2e-6


# -- heat ------------------------------------------------------------------------------


def test_heat_goes_back_level_by_level_and_ends_without_noise():
    heat = corruption.HeatDissipation(8, examples=IMAGE[None], noise=0.2, delta=0.25)
    k = jnp.arange(9)
    widths, levels = jax.jit(
        lambda k: (jax.vmap(heat.width)(k), jax.vmap(heat.blurred, (0, None))(k, IMAGE))
    )(k)
    widths = list(np.asarray(widths))
    assert np.allclose(widths[:2] + widths[-1:], [0, 0.5, 24])
    assert np.allclose(np.diff(np.log(widths[1:])), np.log(48) / 7)

    def step(share, t, x, cond):
        return share * (levels[jnp.round(8 * t).astype(int) - 1] - x)

    model, still = (
        corruption.Restorer(eqx.Partial(step, jnp.array(share)), heat)
        for share in (1.0, 0.0)
    )
    out = sdegen.sample(KEY, model, (30, *IMAGE.shape), trajectory=True)
    assert out.evaluations == 8 and abs(out.x - IMAGE).max() < 1e-12
    for i, x in enumerate(np.asarray(out.trajectory[:-1])):
        spread = 0.2 if i == 0 else 0.25
        residue = x - np.asarray(levels)[8 - i]
        assert abs(residue.std() / spread - 1) < 5 / np.sqrt(2 * residue.size)
    x0 = jnp.broadcast_to(IMAGE, (16, *IMAGE.shape))
    assert loss(model, KEY, x0) < 1e-24
    # a step that does nothing leaves at least the noise of the state
    assert loss(still, KEY, x0) > 0.9 * 0.2**2


# -- tokens ----------------------------------------------------------------------------


def sequences(vocabulary, length):
    """All sequences, (V^l, l), in the order of their numbers in base V."""
    return np.array(list(itertools.product(range(vocabulary), repeat=length)))


def number(x, base):
    """The place of sequences in `sequences`."""
    x = np.asarray(x)
    return (x * base ** np.arange(x.shape[-1])[::-1]).sum(-1)


def laws():
    """Data laws: those of the golden numbers for edits, from one generator."""
    rng = np.random.default_rng(0)
    return {(v, l): rng.dirichlet(np.ones(v**l)) for v, l in ((2, 3), (3, 3), (10, 2))}


LAWS = laws()
LAW = LAWS[2, 3]


class Exact(eqx.Module):
    """The exact conditionals log p(x0_i = v | x_t), by enumeration."""

    law: jax.Array
    states: jax.Array
    vocabulary: int = eqx.field(static=True)
    edit: bool = eqx.field(static=True)

    def __call__(self, t, x, cond=None):
        same = x[:, None, :] == self.states
        if self.edit:
            apart = jnp.round(t * x.shape[1])
            match = (~same).sum(-1) == apart[:, None]
        else:
            match = (same | (x[:, None, :] == self.vocabulary)).all(-1)
        w = match * self.law
        hot = jax.nn.one_hot(self.states, self.vocabulary)
        return jnp.log(jnp.einsum("bs,slv->blv", w / w.sum(-1, keepdims=True), hot))


def restorer(system, law=LAW, length=3):
    states = jnp.asarray(sequences(system.vocabulary, length))
    edit = isinstance(system, corruption.Edit)
    return corruption.Restorer(
        Exact(jnp.asarray(law), states, system.vocabulary, edit), system
    )


@eqx.filter_jit
def moves(model, t, x):
    return jax.vmap(model.system.moves)(x, model(t, x))


def chain_law(model, length, start):
    """The law of the chain of single moves, from a law over all states."""
    base = model.system.vocabulary + isinstance(model.system, corruption.Mask)
    states = sequences(base, length)
    law = np.asarray(start)
    for t in range(length, 0, -1):
        live = states[law > 0]
        w = np.asarray(jnp.exp(moves(model, jnp.array(t / length), jnp.asarray(live))))
        assert np.allclose(w.sum((1, 2)), t, rtol=1e-12)  # the weights need no sum
        new = np.zeros_like(law)
        for i in range(length):
            for v in range(model.system.vocabulary):
                after = live.copy()
                after[:, i] = v
                np.add.at(new, number(after, base), law[law > 0] * w[:, i, v] / t)
        law = new
    return law


def variation(p, q):
    return 0.5 * abs(np.asarray(p) - np.asarray(q)).sum()


def masked_law(law, vocabulary=2, length=3):
    """(the chain's law over unmasked sequences, whatever else it leaves)."""
    base = vocabulary + 1
    start = np.zeros(base**length)
    start[-1] = 1.0
    end = chain_law(restorer(corruption.Mask(vocabulary), law, length), length, start)
    inside = number(sequences(vocabulary, length), base)
    return end[inside], end.sum() - end[inside].sum()


def product_law(law):
    """All tokens at once from their marginals."""
    cube = np.asarray(law).reshape(2, 2, 2)
    one = [cube.sum((1, 2)), cube.sum((0, 2)), cube.sum((0, 1))]
    return np.einsum("i,j,k->ijk", *one).ravel()


PARITY = np.array([0.25 * (sum(s) % 2 == 0) for s in sequences(2, 3)])


@pytest.mark.parametrize("law", [LAW, PARITY], ids=["random", "parity"])
def test_one_mask_at_a_time_is_exact_with_conditionals_of_single_places(law):
    end, rest = masked_law(law)
    assert abs(rest) < 1e-12 and variation(end, law) < 1e-12


def test_all_masks_at_once_see_only_the_marginals():
    model = restorer(corruption.Mask(2))
    hidden = jnp.full((1, 3), 2)
    w = np.exp(moves(model, jnp.array(1.0), hidden))[0]
    shot = np.einsum("i,j,k->ijk", *w).ravel()
    assert abs(variation(shot, LAW) - 0.1675256) < 1e-6
    assert variation(shot, product_law(LAW)) < 1e-12
    assert abs(variation(product_law(PARITY), PARITY) - 0.5) < 1e-12


def remask_law(joint):
    """The chain that draws everything and hides t - 1 places afresh, enumerated."""
    law, states, cube = np.zeros(27), sequences(3, 3), LAW
    law[-1] = 1.0
    plain = sequences(2, 3)
    for t in (3, 2, 1):
        new = np.zeros(27)
        for x, mass in zip(states, law, strict=True):
            if mass == 0:
                continue
            fits = ((plain == x) | (x == 2)).all(1)
            posterior = cube * fits / (cube * fits).sum()
            if not joint:
                p = [(posterior * (plain[:, i] == 1)).sum() for i in range(3)]
                each = np.where(plain == 1, p, 1 - np.array(p))
                posterior = np.prod(np.where(x == 2, each, plain == x), axis=1)
            for hidden in itertools.combinations(range(3), t - 1):
                after = plain.copy()
                after[:, list(hidden)] = 2
                share = 1 / len(list(itertools.combinations(range(3), t - 1)))
                np.add.at(new, number(after, 3), mass * posterior * share)
        law = new
    return law[number(plain, 3)]


EDITS = {(2, 3): 0.0601, (3, 3): 0.0169, (10, 2): 0.0033}


@functools.cache
def edited_law(vocabulary, length, uniform):
    law = LAWS[vocabulary, length]
    states = sequences(vocabulary, length)
    start = np.full(len(law), 1 / len(law))
    if not uniform:
        apart = (states[:, None] != states).sum(-1) == length
        start = law @ apart / (vocabulary - 1) ** length
    return chain_law(restorer(corruption.Edit(vocabulary), law, length), length, start)


@pytest.mark.parametrize("vocabulary, length", EDITS)
def test_edits_are_exact_from_their_own_start_and_not_from_a_uniform_one(
    vocabulary, length
):
    law = LAWS[vocabulary, length]
    assert variation(edited_law(vocabulary, length, False), law) < 1e-12
    golden = EDITS[vocabulary, length]
    assert abs(variation(edited_law(vocabulary, length, True), law) - golden) < 5e-5


EXAMPLES = sequences(2, 3)[np.random.default_rng(1).choice(8, 400_000, p=LAW)]


@pytest.mark.parametrize(
    "system, steps, law",
    [
        (corruption.Mask(2), None, lambda: LAW),
        (corruption.Mask(2), 1, lambda: product_law(LAW)),
        (corruption.Mask(2, remask=True), None, lambda: remask_law(joint=False)),
        (corruption.Edit(2), None, lambda: edited_law(2, 3, True)),
        (corruption.Edit(2, EXAMPLES), None, lambda: LAW),
    ],
    ids=["mask", "at once", "remask", "edit", "edit from data"],
)
def test_the_sampler_follows_its_law(system, steps, law):
    out = sdegen.sample(KEY, restorer(system), (MANY, 3), grid=steps)
    p = law()
    assert out.x.dtype == jnp.int32 and out.evaluations == (steps or 3)
    seen = np.bincount(number(out.x, 2), minlength=8) / MANY
    scores = (seen - p) / np.sqrt(p * (1 - p) / MANY)
    assert abs(scores).max() < 4.5, scores
    if variation(p, LAW) > 0.05:  # and it would see the difference
        assert abs((seen - LAW) / np.sqrt(LAW / MANY)).max() > 5


def test_hiding_afresh_is_exact_for_a_joint_head_alone():
    assert variation(remask_law(joint=True), LAW) < 1e-12
    assert abs(variation(remask_law(joint=False), LAW) - 0.0174464) < 1e-6


def test_given_tokens_stay_and_the_rest_follow_their_conditional():
    start = jnp.broadcast_to(jnp.array([2, 1, 2]), (MANY, 3))
    out = sdegen.sample(KEY, restorer(corruption.Mask(2)), (MANY, 3), start=start)
    cube = LAW.reshape(2, 2, 2)[:, 1]
    p = (cube / cube.sum()).ravel()
    assert (out.x[:, 1] == 1).all()
    seen = np.bincount(number(out.x[:, ::2], 2), minlength=4) / MANY
    assert abs((seen - p) / np.sqrt(p / MANY)).max() < 4.5


def test_a_sample_does_not_depend_on_its_batch():
    model = restorer(corruption.Edit(2))
    few = sdegen.sample(KEY, model, (4, 3), trajectory=True)
    more = sdegen.sample(KEY, model, (MANY, 3))
    assert (few.x == more.x[:4]).all() and len(np.unique(few.x, axis=0)) > 1
    frames = np.asarray(few.trajectory)  # every step changes one token
    assert ((frames[1:] != frames[:-1]).sum(-1) == 1).all()
    assert (frames[-1] == few.x).all() and np.allclose(few.times, [1, 2 / 3, 1 / 3, 0])


@pytest.mark.parametrize(
    "system", [corruption.Mask(4), corruption.Edit(4)], ids=["mask", "edit"]
)
def test_exactly_so_many_tokens_are_corrupted_in_every_place_alike(system):
    x0 = jnp.broadcast_to(jnp.array([3, 0, 1, 2, 3]), (MANY, 5))
    for t in (0, 2, 5):
        x = np.asarray(corruption.corrupt(KEY, system, t / 5, x0))
        changed = x != np.asarray(x0)
        assert (changed.sum(1) == t).all()
        if t == 2:
            pairs = changed.astype(int).T @ changed / MANY
            off = pairs[~np.eye(5, dtype=bool)]
            assert abs(off - 0.1).max() < 4.5 * np.sqrt(0.09 / MANY)
    if isinstance(system, corruption.Mask):
        assert (x == 4).all()
    else:  # the others, each as often
        seen = np.bincount(((x - np.asarray(x0)) % 4).ravel(), minlength=4) / x.size
        assert seen[0] == 0 and abs(seen[1:] - 1 / 3).max() < 4.5 * 0.5 / np.sqrt(
            x.size
        )


ENTROPY = float(-(LAW * np.log(LAW)).sum())


def test_the_loss_of_exact_conditionals_is_the_entropy_of_a_token():
    loss = jax.jit(
        lambda k, x: corruption.restoration_loss(restorer(corruption.Mask(2)), k, x)
    )
    values = [
        loss(k, EXAMPLES[i::100]) for i, k in enumerate(jax.random.split(KEY, 20))
    ]
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    assert error < 0.005
    assert abs(np.mean(values) - ENTROPY / 3) < 5 * error


def test_the_loss_on_two_devices_is_that_of_the_whole_batch():
    model = restorer(corruption.Edit(2))

    @jax.jit
    def both(x0):
        def part(x):
            return corruption.restoration_loss(model, KEY, x, axis_name="i")

        parts = jax.vmap(part, axis_name="i")(x0.reshape(2, 4, 3))
        return parts, corruption.restoration_loss(model, KEY, x0)

    parts, whole = both(EXAMPLES[:8])
    assert parts[0] != parts[1] and np.isclose(parts.mean(), whole, rtol=1e-12)


def test_a_batch_of_one_s_own_is_that_of_the_loss():
    model, x0 = restorer(corruption.Mask(2)), EXAMPLES[:16]
    batch = sdegen.losses.draw_batch(model, KEY, jnp.asarray(x0))
    hidden = np.asarray(batch.x_t == 2).sum(1)
    assert (hidden == np.round(3 * np.asarray(batch.t))).all() and len(set(hidden)) == 3
    error = jax.vmap(model.system.error)
    own = error(batch.t, batch.target, batch.x_t, model(batch.t, batch.x_t)).mean()
    assert np.isclose(own, model.loss(KEY, jnp.asarray(x0)), rtol=1e-12)


class Table(eqx.Module):
    """Free logits for every state."""

    logits: jax.Array

    def __call__(self, t, x, cond):
        return self.logits[x @ jnp.array([9, 3, 1])]


def test_fit_learns_the_conditionals(float32):
    model = corruption.Restorer(Table(jnp.zeros((27, 3, 2))), corruption.Mask(2))
    fit = sdegen.fit(
        model,
        np.asarray(EXAMPLES[:50_000], np.float32),
        steps=150,
        batch_size=512,
        optimizer=sdegen.AdamW(learning_rate=0.1),
        ema=0.95,
        progress=False,
    )
    assert abs(fit.losses[0] - np.log(2)) < 1e-5
    assert abs(fit.losses[-50:].mean() - ENTROPY / 3) < 0.02
    # all hidden: the marginals; the last hidden: the conditional seen most often
    table = np.asarray(jax.nn.softmax(fit.model.network.logits))
    cube = LAW.reshape(2, 2, 2)
    assert abs(table[26, 1] - cube.sum((0, 2))).max() < 0.04
    a, b = np.unravel_index(cube.sum(2).argmax(), (2, 2))
    assert abs(table[9 * a + 3 * b + 2, 2] - cube[a, b] / cube[a, b].sum()).max() < 0.04


# -- the transformer -------------------------------------------------------------------


def test_the_transformer_sees_times_places_and_neighbours_and_no_other_sample(float32):
    new = Transformer(8, 1, 2)(5, 4, KEY)
    assert type(new) is TokenTransformer
    forward = jax.jit(lambda net, t, x: net(t, x))
    x = np.array([[0, 1, 2, 3, 4], [4, 4, 1, 0, 0]])
    t = np.array([0.2, 0.7], np.float32)
    assert (forward(new, t, x) == 0).all()  # uniform at first
    rng = np.random.default_rng(0)
    net = jax.tree.map(lambda p: (0.3 * rng.normal(size=p.shape)).astype(p.dtype), new)
    out = np.asarray(forward(net, t, x))
    assert out.shape == (2, 5, 4) and out.dtype == np.float32

    def moved(t, x):
        """How far each place of each sample goes."""
        return abs(np.asarray(forward(net, t, x)) - out).max(-1)

    one = moved(np.array([0.2, 0.5], np.float32), x)  # the time of one sample
    assert (one[0] < 1e-6).all() and (one[1] > 1e-3).all()
    last = x.copy()
    last[0, 4] = 0
    one = moved(t, last)  # the last place of the other: all of its places see it
    assert (one[0] > 1e-4).all() and (one[1] < 1e-6).all()
    turned = forward(net, t, x[:, ::-1])[:, ::-1]  # and the order matters
    assert abs(turned - out).max() > 1e-3


# -- mistakes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mistake, sentence",
    [
        (lambda: corruption.Gaussian(process("VP"), 1.5), "eta is the share"),
        (lambda: corruption.Cold(corruption.Blur(), keep=2.0), "keep from 0"),
        (lambda: corruption.Cold(corruption.Blur(), noise=-1.0), "noise >= 0"),
        (lambda: corruption.Downsample(3), "power of two"),
        (lambda: corruption.Downsample(8)(1.0, IMAGE), "sides that 8 divides"),
        (lambda: corruption.HeatDissipation(1), "levels >= 2"),
        (lambda: corruption.HeatDissipation(sigma_min=30.0), "sigma_min < sigma_max"),
        (lambda: corruption.HeatDissipation().times(3, ()), "200 levels"),
        (lambda: corruption.Edit(1), "at least 2"),
        (lambda: corruption.Mask(2).times(4, (3,)), "at most 3 steps"),
        (lambda: corruption.Cold(corruption.Blur()).times(0, ()), "at least one step"),
        (lambda: corruption.Cold(corruption.Blur()).prior(KEY, (3,)), "start="),
        (lambda: corruption.Edit(2, EXAMPLES).prior(KEY, (4,)), "shape (4,)"),
        (lambda: draw(Exact, (5,)), "at least two axes"),
        (lambda: draw(Exact, (5, 3), grid=jnp.array([0.0, 1.0])), "times that fall"),
        (lambda: draw(Exact, (5, 3), start=jnp.zeros((4, 3))), "shape (5, 3)"),
        (lambda: draw(Exact, (5, 3), stochasticity=1.0), "runs the chain of Mask"),
        (lambda: timed(corruption.Mask(2)), "at the times of its system"),
        (lambda: draw(Exact, (5, 3), grid=sdegen.LogSNRGrid(3)), "a number of steps"),
        (lambda: draw(lambda t, x, cond: x[:, :2], (5, 3)), "the prediction (5, 2)"),
        (lambda: draw(lambda t, x, cond: jnp.ones((5, 3, 7)), (5, 3)), "2 tokens"),
        (lambda: Transformer(6, 1, 4)(3, 2, KEY), "multiple of heads"),
    ],
)
def test_a_mistake_is_answered_with_a_sentence(mistake, sentence):
    with pytest.raises(ValueError) as error:
        mistake()
    assert sentence in str(error.value)


def draw(network, shape, **kwargs):
    return sdegen.sample(
        KEY, corruption.Restorer(network, corruption.Mask(2)), shape, **kwargs
    )


def timed(system):
    return sdegen.losses.draw_batch(
        restorer(system), KEY, jnp.asarray(EXAMPLES[:2]), times=sdegen.times.Uniform()
    )
