"""The contract of every network, and the convolution that stays fast inside loops.

Networks are found in `sdegen.nets`; each needs one line in MAKE. They are compared with
finite differences, with other programs of the same numbers and with Optax's arithmetic;
`conv` with `lax.conv_general_dilated`, in values and derivatives of every kind.
"""

import functools
import inspect
import itertools
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sdegen.nets
from sdegen import nets
from sdegen.nets import MLP, MLPConfig, UNet, UNetConfig
from sdegen.nets.conv import conv
from sdegen.nets.layers import check_sides
from sdegen.nets.network import _made

SMALL = {"channels": 4, "multiples": (1, 2), "blocks": 1}
MAKE = {
    MLP: ((3, 2), {"width": 16, "depth": 2}),
    UNet: ((4, 4, 2), SMALL),
    nets.ScoreUNet: ((4, 4, 2), SMALL | {"ncsn": True}),
    nets.ADMUNet: ((4, 4, 2), SMALL | {"multiples": (1,)}),
    nets.EDM2UNet: ((4, 4, 2), SMALL | {"channels": 8}),
    nets.DiffusionTransformer: ((4, 4, 2), {"width": 16, "depth": 2, "heads": 2}),
}
"""The shape of a sample and the sizes of a tiny network, by class."""
CONFIGS = {
    MLPConfig: (MLP, MLPConfig(width=16, depth=2)),
    UNetConfig: (UNet, UNetConfig(**SMALL)),
    nets.DDPMppConfig: (nets.ScoreUNet, nets.DDPMppConfig(**SMALL, dropout=0.0)),
    nets.NCSNppConfig: (nets.ScoreUNet, nets.NCSNppConfig(**SMALL, dropout=0.0)),
    nets.ADMConfig: (nets.ADMUNet, nets.ADMConfig(4, (1,), 1, dropout=0.0)),
    nets.EDM2Config: (nets.EDM2UNet, nets.EDM2Config(**MAKE[nets.EDM2UNet][1])),
    nets.DiTConfig: (
        nets.DiffusionTransformer,
        nets.DiTConfig(**MAKE[nets.DiffusionTransformer][1]),
    ),
}
"""The class and the configuration of the tiny network, by class of configurations."""
EXPORTED = {n: c for n, c in sorted(vars(sdegen.nets).items()) if inspect.isclass(c)}
NETWORKS = {n: c for n, c in EXPORTED.items() if issubclass(c, nnx.Module)}
BATCH, COND = 5, 4


every_network = pytest.mark.parametrize("cls", NETWORKS.values(), ids=NETWORKS)


@functools.cache
def network(cls, cond_dim=COND, dtype=None, seed=0, **sizes):
    """A tiny network with noise on every parameter: no zero layer, nothing compiled."""
    shape, default = MAKE[cls]
    shape, sizes = sizes.pop("shape", shape), default | sizes
    with jax.enable_x64(False):
        return noisy(
            nnx.eval_shape(
                lambda: cls(
                    shape, cond_dim=cond_dim, dtype=dtype, rngs=nnx.Rngs(0), **sizes
                )
            ),
            seed,
        )


def noisy(abstract, seed=0):
    """A network with noise in place of the shapes of its parameters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), abstract
    )


TRACES = []


@jax.jit
def forward(net, t, x, cond):
    """One compiled call, shared by the tests; `TRACES` counts its programs."""
    TRACES.append(type(net))
    return net(t, x, cond)


@functools.cache
def loss_and_gradients(cls):
    """A compiled loss in float64, with gradients for all that goes into a network."""
    weights = np.random.default_rng(9).normal(size=(BATCH, *MAKE[cls][0]))

    def loss(net, t, x, cond):
        return jnp.sum(weights * net(t, x, cond))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))


def primals(cls):
    """Arguments of `loss_and_gradients`: the tiny network in float64 and its inputs."""
    as_float64 = jax.tree.map(lambda p: np.asarray(p, np.float64), network(cls))
    return as_float64, *inputs(cls, dtype=jnp.float64)


def inputs(cls, seed=0, dtype=jnp.float32):
    """A batch of times, states and conditions."""
    rng = np.random.default_rng(seed)
    shapes = ((BATCH,), (BATCH, *MAKE[cls][0]), (BATCH, COND))
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in shapes)


def close(a, b, tolerance=2e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a.shape == b.shape and abs(a - b).max() <= tolerance * (1 + abs(b).max())


def test_every_exported_network_is_under_test():
    missing = sorted(set(NETWORKS.values()) ^ set(MAKE), key=str)
    assert not missing, f"give {missing} one line in MAKE of tests/test_nets.py"
    # The others go around a network and are tested with the data that need them.
    others = {nets.ImageConditioned, nets.HeavyTailed}
    configs = set(EXPORTED.values()) - set(NETWORKS.values()) - others
    assert configs == set(CONFIGS), "give the configuration one line in CONFIGS"


# -- the contract ----------------------------------------------------------------------


@every_network
def test_one_time_for_all_is_the_same_as_one_time_each(cls, float32):
    _, x, cond = inputs(cls)
    t, net = jnp.float32(0.3), network(cls)
    # With a condition the embedding of one time is that of as many times ...
    cond = jnp.broadcast_to(cond[0], cond.shape)
    embed = jax.jit(lambda net, t: net.embed(t, cond))
    assert close(embed(net, t), embed(net, jnp.full(BATCH, t)))
    # ... and one embedding for all does what as many do.
    predict = jax.jit(lambda net, x, emb: net.predict(x, emb, None))
    one = predict(net, x, embed(net, t)[0])
    each = forward(net, jnp.full(BATCH, t), x, cond)
    assert one.shape == each.shape == x.shape
    assert one.dtype == each.dtype == x.dtype
    assert close(one, each)


@every_network
def test_without_conditions_times_may_be_one_or_many_too(cls, float32):
    _, x, _ = inputs(cls)
    for t in (jnp.float32(0.3), jnp.ones(BATCH, jnp.float32)):
        out = jax.eval_shape(network(cls, cond_dim=0), t, x)
        assert (out.shape, out.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_new_network_says_zero(config, float32):
    cls, make = config
    t, x, cond = inputs(cls)

    def new(key):
        return make(x.shape[1:], key, cond_dim=COND)

    abstract = jax.eval_shape(new, jax.random.key(3))
    assert type(abstract) is cls and abstract.shape == x.shape[1:]
    # Whatever the other layers do: only these are compiled.
    paths = [str(path[0]) for path, _ in jax.tree.leaves_with_path(abstract)]
    own = [i for i, path in enumerate(paths) if path in (".first", ".last", ".gain")]
    seen = jax.jit(lambda key: [jax.tree.leaves(new(key))[i] for i in own])
    found = dict(zip(own, seen(jax.random.key(3)), strict=True))
    assert {paths[i] for i, p in found.items() if p.any()} >= {".first"}
    noise = jax.tree.leaves(noisy(abstract))
    leaves = [found.get(i, p) for i, p in enumerate(noise)]
    net = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    assert (forward(net, t, x, cond) == 0).all()
    # Frozen, so that it may stand in a config or be a key.
    assert hash(make) == hash(type(make)(**vars(make)))


def test_a_new_network_is_a_function_of_the_key(float32):
    shape, make = (3,), MLPConfig(width=8, depth=1)
    # Without jit and without the configuration: another program, the same numbers.
    again, other = (
        MLP(shape, width=make.width, depth=make.depth, rngs=nnx.Rngs(jax.random.key(k)))
        for k in (3, 4)
    )
    net = make(shape, jax.random.key(3))
    assert jax.tree.structure(net) == jax.tree.structure(again)
    assert all(map(close, jax.tree.leaves(net), jax.tree.leaves(again)))
    assert not all(map(close, jax.tree.leaves(net), jax.tree.leaves(other)))


@every_network
def test_a_network_is_a_pytree_that_jit_takes_as_an_argument(cls, float32):
    t, x, cond = inputs(cls)
    before, outs = len(TRACES), []
    for seed in (0, 1):  # another network of the same sizes is the same program
        outs.append(forward(network(cls, seed=seed), t, x, cond))
    assert len(TRACES) - before <= 1 and not close(*outs)


@every_network
def test_networks_are_averaged_by_a_tree_map(cls, float32):
    t, x, cond = inputs(cls)
    a, b = network(cls), network(cls, seed=1)

    @jax.jit
    def mean(a, b):
        return jax.tree.map(lambda p, q: 0.5 * p + 0.5 * q, a, b)

    same = mean(a, a)
    assert type(same) is cls
    assert eqx.tree_equal(a, same)
    mixed = mean(a, b)
    outs = [forward(net, t, x, cond) for net in (a, b, mixed)]
    assert not close(outs[2], outs[0]) and not close(outs[2], outs[1])


@every_network
def test_vmap_over_networks_is_a_loop_over_networks(cls, float32):
    t, x, cond = inputs(cls)
    trials = [network(cls, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *p: np.stack(p), *trials)
    # One sample, that does not know of the batch that it is in below.
    one = (a[2:3] for a in (t, x, cond))
    together = jax.jit(jax.vmap(forward, (0, None, None, None)))(stacked, *one)
    alone = [forward(net, t, x, cond)[2:3] for net in trials]
    assert close(together, jnp.stack(alone))


@every_network
@pytest.mark.parametrize("part", range(4), ids=["parameters", "times", "x", "cond"])
def test_gradients_are_those_of_finite_differences(cls, part):
    # In float64, but for the softmax of the attention, which JAX computes in float32:
    # hence a step that is not small, and a formula of fourth order. Networks are quick
    # in time, the transformer at 250 radians a unit.
    primal, loss = list(primals(cls)), loss_and_gradients(cls)
    gradient = loss(*primal)[1][part]
    rng, h = np.random.default_rng(part), 5e-5 if part == 1 else 5e-4
    step = jax.tree.map(lambda p: rng.normal(size=p.shape), primal[part])

    def value(steps):
        # NumPy: JAX would compile a sum for every shape
        moved = jax.tree.map(
            lambda p, d: np.asarray(p) + steps * h * d, primal[part], step
        )
        return loss(*primal[:part], moved, *primal[part + 1 :])[0]

    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(step), strict=True)
    exact = sum(np.vdot(g, d) for g, d in pairs)
    quotient = (8 * (value(1) - value(-1)) - (value(2) - value(-2))) / (12 * h)
    print("derivative", exact, "difference quotient", quotient)
    assert abs(exact) > 0.05
    assert abs(quotient - exact) < 1e-3 * (1 + abs(exact))


@every_network
def test_optax_moves_a_network_as_it_moves_arrays(cls):
    net, *rest = primals(cls)
    before, (gradient, *_) = loss_and_gradients(cls)(net, *rest)
    optimiser = optax.sgd(1e-4)

    @jax.jit
    def step(net, gradient):
        updates, _ = optimiser.update(gradient, optimiser.init(net), net)
        return optax.apply_updates(net, updates)

    after = step(net, gradient)
    by_hand = jax.tree.map(lambda p, g: p - 1e-4 * np.asarray(g), net, gradient)
    pairs = zip(jax.tree.leaves(after), jax.tree.leaves(by_hand), strict=True)
    assert all(close(a, b, 1e-15) for a, b in pairs)
    assert loss_and_gradients(cls)(after, *rest)[0] < before


@every_network
def test_a_sample_does_not_see_its_batch_mates(cls, float32):
    t, x, cond = inputs(cls)
    net = network(cls)
    out = forward(net, t, x, cond)
    others = jnp.arange(BATCH) != 2
    changed = [
        jnp.where(others.reshape((-1,) + (1,) * (a.ndim - 1)), 1 - 3 * a, a)
        for a in (t, x, cond)
    ]
    assert (forward(net, *changed)[2] == out[2]).all()
    assert not close(forward(net, *changed)[1], out[1])


@every_network
def test_time_and_condition_matter_one_sample_at_a_time(cls, float32):
    t, x, cond = inputs(cls)
    net = network(cls)
    out = forward(net, t, x, cond)
    for t2, cond2 in ((t.at[1].add(0.5), cond), (t, cond.at[1].add(0.5))):
        changed = forward(net, t2, x, cond2)
        assert abs(changed - out)[1].max() > 1e-3
        assert (jnp.delete(changed, 1, axis=0) == jnp.delete(out, 1, axis=0)).all()


@every_network
def test_conditions_that_do_not_fit_are_refused(cls, float32):
    t, x, cond = inputs(cls)
    with pytest.raises(
        ValueError, match=r"made for a condition .*\(batch, 4\), got none"
    ):
        network(cls)(t, x)
    with pytest.raises(ValueError, match=r"got one of shape \(5, 3\)"):
        network(cls)(t, x, cond[:, :3])
    with pytest.raises(ValueError, match="made without a condition, got one"):
        network(cls, cond_dim=0)(t, x, cond)


@every_network
def test_integer_labels_are_one_hot_vectors_and_the_last_is_no_class(cls, float32):
    t, x, _ = inputs(cls)
    labels = jnp.array([0, 3, COND, 1, 2], jnp.uint8)
    vectors = np.eye(COND + 1, COND, dtype=np.float32)[labels]
    vectors = jnp.asarray(vectors)
    out = forward(network(cls), t, x, labels)
    assert (out == forward(network(cls), t, x, vectors)).all()
    with pytest.raises(ValueError, match="0 to 3, or 4 for no class, got 1 to 5"):
        network(cls)(t, x, labels + 1)
    with pytest.raises(ValueError, match=r"got one of shape \(4,\)"):
        network(cls)(t[:4], x[:4], jnp.ones(4))  # once one vector for all


def test_a_configuration_of_classes_makes_a_network_of_labels(float32):
    config = nets.MLPConfig(width=16, depth=2, classes=COND)
    assert config((3, 2), jax.random.key(0)).cond_dim == COND
    with pytest.raises(ValueError, match="classes=4 and cond_dim=3"):
        config((3, 2), jax.random.key(0), cond_dim=3)
    with pytest.raises(ValueError, match="2 or more"):
        nets.MLPConfig(classes=1)((3, 2), jax.random.key(0))


@every_network
def test_samples_of_another_shape_are_refused(cls, float32):
    t, x, cond = inputs(cls)
    expected = f"this {cls.__name__} was made for x of shape"
    for bad in (x[..., :1], jnp.swapaxes(x, 1, -1), jnp.concatenate([x, x], axis=1)):
        with pytest.raises(ValueError, match=expected):
            network(cls)(t, bad, cond)


@every_network
def test_bfloat16_computes_less_and_stores_the_same(cls, float32):
    half, full = network(cls, dtype=jnp.bfloat16), network(cls)
    assert {p.dtype for p in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    out, exact = forward(half, *inputs(cls)), forward(full, *inputs(cls))
    assert out.dtype == jnp.bfloat16
    # eight bits of mantissa, a few layers: percents, and not nothing
    error = abs(out.astype(jnp.float32) - exact).max() / abs(exact).max()
    print("relative error", error)
    assert 1e-4 < error < 5e-2


@every_network
def test_parameters_are_float32_under_x64_too(cls):
    shape, sizes = MAKE[cls]
    new = nnx.eval_shape(lambda: cls(shape, cond_dim=2, rngs=nnx.Rngs(0), **sizes))
    assert {p.dtype for p in jax.tree.leaves(new)} == {jnp.dtype("float32")}


# -- the UNet --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 8, 1), (8, 6, 1), (2, 2, 1), (6, 1)])
def test_a_unet_refuses_sides_that_it_cannot_halve(shape, float32):
    with pytest.raises(ValueError, match="divisible by 4 .*halves them 2 times"):
        UNet(shape, channels=8, multiples=(1, 1, 1), rngs=nnx.Rngs(0))


def test_a_unet_works_at_any_depth_on_images_that_are_not_square(float32):
    net = network(UNet, 0, shape=(8, 4, 3), multiples=(1, 3, 2))
    t, x = jnp.float32(0.1), jnp.ones((2, 8, 4, 3)) * jnp.arange(8.0)[:, None, None]
    out = forward(net, t, x, None)
    assert out.shape == x.shape
    # Attention at the lowest resolution: every pixel sees every other of its image.
    far = forward(net, t, x.at[0, 0, 0, 0].add(1.0), None)
    assert abs(far - out)[0, -1, -1].max() > 0
    assert (far[1] == out[1]).all()


@pytest.mark.parametrize("shape", [(8, 3), (4, 4, 4, 3)])
def test_a_unet_works_on_series_and_volumes(shape, float32):
    net, t = network(UNet, 0, shape=shape, multiples=(1, 2)), jnp.float32(0.1)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape)), jnp.float32)
    out = forward(net, t, x, None)
    far = forward(net, t, x.at[(0,) * x.ndim].add(1.0), None)
    assert out.shape == x.shape and abs(far - out)[0, -1].max() > 0
    assert (far[1] == out[1]).all()


def test_what_a_network_is_not_for_is_named():
    for shape, kind in {(4,): "vectors", (8, 2): "series", (4, 4, 4, 1): "vol"}.items():
        with pytest.raises(ValueError, match=f"needs images.*got .*: {kind}"):
            check_sides(None, shape, 2, "2")
    with pytest.raises(ValueError, match="vectors .features,.. nets.UNetConfig"):
        UNet((4,), rngs=nnx.Rngs(0))


# -- the convolution -------------------------------------------------------------------


def plain(x, w):
    numbers = {3: ("NHC", "HIO", "NHC"), 4: ("NHWC", "HWIO", "NHWC")}[x.ndim]
    ones = (1,) * (x.ndim - 2)
    return jax.lax.conv_general_dilated(x, w, ones, "SAME", dimension_numbers=numbers)


def images(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def agree(transform, *arguments):
    """transform(conv) and transform(lax's) give the same arrays on `arguments`."""
    both = jax.jit(lambda *a: (transform(conv)(*a), transform(plain)(*a)))
    got, expected = both(*arguments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert abs(a - b).max() < 1e-12 * (1 + abs(b).max())


def derivatives(f):
    """f as (x, w, dx, dw, dy) -> its value, forward and reverse derivatives."""

    def everything(x, w, dx, dw, dy):
        return jax.jvp(f, (x, w), (dx, dw)), jax.vjp(f, x, w)[1](dy)

    return everything


@pytest.mark.parametrize("k, height, width", [(1, 4, 5), (3, 4, 5), (5, 2, 3)])
def test_conv_has_the_values_and_gradients_of_lax(k, height, width):
    x, y = (2, height, width, 3), (2, height, width, 4)
    agree(derivatives, *images(x, (k, k, 3, 4), x, (k, k, 3, 4), y))


def test_conv_of_series_has_the_values_and_gradients_of_lax():
    agree(derivatives, *images(*2 * [(2, 5, 3), (3, 3, 4)], (2, 5, 4)))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (3, None), (2, 4)])
def test_conv_under_vmap_is_lax_under_vmap(axes):
    arrays = images(*2 * [(2, 4, 5, 3), (3, 3, 3, 4)], (2, 4, 5, 4))
    axes = (*axes, *axes, None)
    scales = jnp.arange(1.0, 7.0)
    mapped = [
        a if i is None else jnp.stack([a * s for s in scales], i)
        for a, i in zip(arrays, axes, strict=True)
    ]
    agree(lambda f: jax.vmap(derivatives(f), axes), *mapped)


def test_conv_under_two_vmaps_is_lax_under_two_vmaps():
    x, w = images((2, 3, 2, 4, 5, 3), (2, 3, 3, 3, 4))
    agree(lambda f: jax.vmap(jax.vmap(f, (0, None)), (0, 0), 3), x, w)


def test_conv_has_the_second_derivatives_of_lax():
    x, w = images((1, 3, 2, 2), (3, 3, 2, 2))

    def hessian(f):
        def energy(x, w):
            return jnp.sum(jnp.sin(f(x, w)) ** 2)

        forward_over_reverse = jax.jacfwd(jax.grad(energy, (0, 1)), (0, 1))
        reverse_over_reverse = jax.jacrev(jax.grad(energy, 1), 0)
        return lambda *a: (forward_over_reverse(*a), reverse_over_reverse(*a))

    agree(hessian, x, w)


def test_conv_keeps_bfloat16():
    x, w = (a.astype(jnp.bfloat16) for a in images((2, 4, 4, 3), (3, 3, 3, 4)))
    out = conv(x, w)
    assert out.dtype == jnp.bfloat16
    exact = plain(x.astype(jnp.float32), w.astype(jnp.float32))
    assert close(out, exact, 2**-8)


@pytest.mark.usefixtures("float32", "well_compiled")
def test_gradients_inside_a_scan_are_as_fast_as_at_top_level():
    """lax's own are 30 times slower there on a CPU; 5 leaves room for a busy one."""
    calls = 5
    x, w = images((8, 16, 16, 32), (3, 3, 32, 32))
    w = 0.05 * w

    def gradient(w):
        return jax.grad(lambda w: jnp.mean(conv(jax.nn.silu(conv(x, w)), w) ** 2))(w)

    one = jax.jit(lambda w: w - 1e-3 * gradient(w))

    @jax.jit
    def scanned(w):
        def body(w, _):
            return w - 1e-3 * gradient(w), None

        return jax.lax.scan(body, w, length=calls)[0]

    def top_level(w):
        for _ in range(calls):
            w = one(w)
        return w

    assert close(scanned(w), top_level(w))
    ratios = []
    for _ in range(9):
        seconds = []
        for run in (
            scanned,
            top_level,
        ):  # interleaved, so that both meet the same noise
            began = time.perf_counter()
            run(w).block_until_ready()
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[0] / seconds[1])
    print("scan / top level:", np.round(sorted(ratios), 2))
    assert np.median(ratios) < 5


def test_one_program_makes_all_networks_of_a_configuration():
    _made.clear_cache()
    made = [nets.MLPConfig(width=8)((2,), jax.random.key(seed)) for seed in (0, 1)]
    assert _made._cache_size() == 1
    one, two = (jax.tree.leaves(network) for network in made)
    assert any((a != b).any() for a, b in zip(one, two, strict=True))  # by their keys
    nets.MLPConfig(width=9)((2,), jax.random.key(0))
    assert _made._cache_size() == 2


# -- networks from elsewhere -----------------------------------------------------------


def test_a_network_of_elsewhere_is_wrapped_by_the_names_of_its_parameters():
    t, x, c = jnp.arange(3.0), jnp.arange(12.0).reshape(3, 4), jnp.ones((3, 1))
    exact = x + 10 * t[:, None] + c

    def first(x, timesteps, labels):
        return x + 10 * timesteps[:, None] + labels

    def pair(sample, t, y):
        return exact, 0 * exact

    def twice(xt, t, context):
        return jnp.concatenate([exact, 0 * exact], axis=-1)

    for fn in (first, pair, twice):
        assert (nets.wrap(fn)(t, x, c) == exact).all()
    assert (nets.wrap(lambda a, b: b, order="xt")(t, x) == t).all()
    assert (nets.wrap(lambda x, t: t, time=1000)(t, x) == 1000 * t - 1).all()
    last = nets.wrap(lambda x, t: [t], time=jnp.square, output=lambda out: out[-1])
    assert (last(t, x) == t**2).all()


def test_what_cannot_be_wrapped_is_answered():
    unknown, plain = lambda a, b: a, nets.wrap(lambda x, t: x)
    one = jnp.ones((1, 1))
    wrong = {
        "the parameters do not say it": lambda: nets.wrap(unknown),
        'perhaps "cond": got': lambda: nets.wrap(unknown, order=("x", "time")),
        "time is the number T": lambda: nets.wrap(plain, time=1),
        "takes no condition": lambda: plain(one[0], one, one),
    }
    for sentence, call in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            call()


@pytest.mark.parametrize(
    "network, sentence",
    [
        (lambda t, x: x, r"which takes \(t, x\). Wrap it: sdegen.nets.wrap\(network\)"),
        (lambda x, t, cond: x, r"which takes \(x, t, cond\)"),
        (lambda a: a, r'wrap\(network, order=\("x", "t"\)\)'),
        (lambda t, x, cond: (x, x), "got tuple. .*wrap"),
    ],
)
def test_a_model_names_the_adapter(network, sentence):
    model = sdegen.VelocityModel(network, sdegen.StochasticInterpolant())
    with pytest.raises(ValueError, match=sentence):
        model.velocity(jnp.ones(()), jnp.ones((2, 1)))


def test_a_network_of_steps_0_to_999_samples_gaussian_data_as_its_chain_does(float32):
    """A DDPM eps network of integer steps, against DDIM written in those steps."""
    mean, std = 1.0, 0.5
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))

    def eps(x, i):  # exact for N(mean, std^2)
        gap = (x - np.sqrt(bar[i]) * mean) * np.sqrt(1 - bar[i])
        return gap / (bar[i] * std**2 + 1 - bar[i])

    def network(x, timesteps):
        a = jnp.sqrt(jnp.asarray(bar))[timesteps][:, None]
        s = jnp.sqrt(1 - jnp.asarray(bar))[timesteps][:, None]
        return s * (x - a * mean) / (a**2 * std**2 + s**2)

    steps = lambda t: jnp.rint(1000 * t - 1).astype(int)  # noqa: E731
    wrapped = nets.wrap(network, time=steps)
    kind = sdegen.prediction.eps
    model = sdegen.Denoiser(wrapped, sdegen.DDPM(), kind, inputs=sdegen.raw_inputs)
    chain = [999, 799, 599, 399, 199, 0]
    x = start = np.linspace(-2, 2, 5)[:, None]
    for i, j in itertools.pairwise(chain):
        x0 = (x - np.sqrt(1 - bar[i]) * eps(x, i)) / np.sqrt(bar[i])
        x = np.sqrt(bar[j]) * x0 + np.sqrt(1 - bar[j]) * eps(x, i)
    grid = (jnp.array(chain) + 1) / 1000
    out = sdegen.sample(
        0,
        model,
        (5, 1),
        grid=grid,
        solver=sdegen.solvers.DDIM(),
        start=jnp.asarray(start, jnp.float32),
    )
    np.testing.assert_allclose(out.x, x, rtol=1e-3, atol=1e-3)
