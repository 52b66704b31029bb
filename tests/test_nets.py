"""The contract of every network, and the convolution that stays fast inside loops.

Networks are found in `sdegen.nets`; each needs one line in MAKE. They are compared with
finite differences, with their own float32 copies and with Optax's arithmetic; `conv` with
`lax.conv_general_dilated`, in values and derivatives of every kind.
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
from sdegen.nets import MLP, Mlp, UNet, Unet, init
from sdegen.nets.conv import conv

MAKE = {
    MLP: ((3, 2), {"width": 16, "depth": 2}),
    UNet: ((4, 4, 2), {"channels": 8, "multiples": (1, 2), "blocks": 1}),
}
"""The shape of a sample and the sizes of a tiny network, by class."""
RECIPES = {
    Mlp: (MLP, (3,), Mlp(width=8, depth=1)),
    Unet: (UNet, (4, 4, 1), Unet(channels=8, multiples=(1,), blocks=1)),
}
EXPORTED = {n: c for n, c in sorted(vars(sdegen.nets).items()) if inspect.isclass(c)}
NETWORKS = {n: c for n, c in EXPORTED.items() if issubclass(c, nnx.Module)}
BATCH, COND = 5, 4

every_network = pytest.mark.parametrize("cls", NETWORKS.values(), ids=NETWORKS)


@functools.cache
def fresh(cls, cond_dim=0, dtype=None, seed=0):
    """A tiny network at its initialisation, in float32."""
    shape, sizes = MAKE[cls]
    with jax.enable_x64(False):
        return init(
            lambda rngs: cls(shape, cond_dim=cond_dim, dtype=dtype, rngs=rngs, **sizes),
            jax.random.key(seed),
        )


@functools.cache
def moved(cls, cond_dim=0, dtype=None):
    """The same with noise on every parameter, so that no layer is zero any more."""
    with jax.enable_x64(False):
        return direction(fresh(cls, cond_dim, dtype), 1, 0.1)


def direction(tree, seed, scale, base=True):
    """Normal noise of size `scale` for every parameter, on top of `tree` or alone."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [
        scale * jax.random.normal(k, x.shape, x.dtype) + (x if base else 0)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, noise)


def inputs(cls, seed=0, dtype=jnp.float32):
    """A batch of times, states and conditions."""
    t_key, x_key, c_key = jax.random.split(jax.random.key(seed), 3)
    return (
        jax.random.normal(t_key, (BATCH,), dtype),
        jax.random.normal(x_key, (BATCH, *MAKE[cls][0]), dtype),
        jax.random.normal(c_key, (BATCH, COND), dtype),
    )


def close(a, b, tolerance=2e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a.shape == b.shape and abs(a - b).max() <= tolerance * (1 + abs(b).max())


def test_every_exported_network_is_under_test():
    missing = sorted(set(NETWORKS.values()) ^ set(MAKE), key=str)
    assert not missing, f"give {missing} one line in MAKE of tests/test_nets.py"
    recipes = {c for c in EXPORTED.values() if c not in NETWORKS.values()}
    assert recipes == set(RECIPES), "give the recipe one line in RECIPES"


# -- the contract ----------------------------------------------------------------------


@every_network
def test_one_time_for_all_is_the_same_as_one_time_each(cls, float32):
    _, x, _ = inputs(cls)
    t, net = jnp.float32(0.3), jax.jit(moved(cls))
    one, each = net(t, x), net(jnp.full(BATCH, t), x)
    assert one.shape == each.shape == x.shape
    assert one.dtype == each.dtype == x.dtype
    assert close(one, each)


@every_network
def test_a_new_network_says_zero(cls, float32):
    for cond_dim in (0, COND):
        t, x, cond = inputs(cls)
        out = jax.jit(fresh(cls, cond_dim))(t, x, cond if cond_dim else None)
        assert (out == 0).all()


@every_network
def test_a_network_is_a_pytree_that_jit_takes_as_an_argument(cls, float32):
    t, x, _ = inputs(cls)
    net, traces = moved(cls), []

    @jax.jit
    def call(net, t, x):
        traces.append(1)
        return net(t, x)

    assert close(call(net, t, x), net(t, x))
    assert close(call(fresh(cls, seed=3), t, x), 0 * x)
    assert len(traces) == 1


@every_network
def test_the_mean_of_a_network_with_itself_is_itself(cls, float32):
    t, x, _ = inputs(cls)
    a, b = moved(cls), fresh(cls)
    same = jax.tree.map(lambda p, q: 0.5 * p + 0.5 * q, a, a)
    assert type(same) is cls
    assert eqx.tree_equal(a, same)
    mixed = jax.tree.map(lambda p, q: 0.5 * p + 0.5 * q, a, b)
    assert not close(jax.jit(mixed)(t, x), jax.jit(a)(t, x))


@every_network
def test_vmap_over_networks_is_a_loop_over_networks(cls, float32):
    t, x, _ = inputs(cls)
    trials = [moved(cls), direction(moved(cls), 2, 0.1), fresh(cls)]
    stacked = jax.tree.map(lambda *p: jnp.stack(p), *trials)
    together = jax.jit(jax.vmap(lambda net: net(t, x)))(stacked)
    assert close(together, jnp.stack([net(t, x) for net in trials]))


@every_network
def test_gradients_are_those_of_finite_differences(cls):
    # The tiny network in float64, where a difference quotient says something.
    net = jax.tree.map(lambda p: p.astype(jnp.float64), moved(cls, COND))
    t, x, cond = inputs(cls, dtype=jnp.float64)
    weights = jax.random.normal(jax.random.key(9), x.shape)

    @jax.jit
    def loss(net, t, x, cond):
        return jnp.sum(weights * net(t, x, cond))

    primal = (net, t, x, cond)
    step = jax.tree.map(
        lambda p, k: jax.random.normal(jax.random.key(k), p.shape, p.dtype),
        primal,
        jax.tree.unflatten(
            jax.tree.structure(primal), range(len(jax.tree.leaves(primal)))
        ),
    )
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*primal)
    for part in range(4):  # the parameters, the times, the states, the conditions
        only = [jax.tree.map(lambda d, on=i == part: d * on, step[i]) for i in range(4)]
        h = 1e-5
        up, down = (
            loss(*jax.tree.map(lambda p, d, s=sign: p + s * h * d, primal, tuple(only)))
            for sign in (1, -1)
        )
        pairs = zip(
            jax.tree.leaves(grads[part]), jax.tree.leaves(step[part]), strict=True
        )
        exact = sum(jnp.vdot(g, d) for g, d in pairs)
        assert abs((up - down) / (2 * h) - exact) < 1e-6 * (1 + abs(exact))


@every_network
def test_optax_moves_a_network_as_it_moves_arrays(cls, float32):
    t, x, _ = inputs(cls)
    net, target = moved(cls), inputs(cls, seed=5)[1]

    @jax.jit
    def value_and_grad(net):
        return jax.value_and_grad(lambda net: jnp.mean((net(t, x) - target) ** 2))(net)

    before, grads = value_and_grad(net)
    optimiser = optax.sgd(1e-2)
    updates, _ = optimiser.update(grads, optimiser.init(net), net)
    after = optax.apply_updates(net, updates)
    by_hand = jax.tree.map(lambda p, g: p - 1e-2 * g, net, grads)
    assert all(map(close, jax.tree.leaves(after), jax.tree.leaves(by_hand)))
    assert value_and_grad(after)[0] < before


@every_network
def test_a_sample_does_not_see_its_batch_mates(cls, float32):
    t, x, cond = inputs(cls)
    net = jax.jit(moved(cls, COND))
    out = net(t, x, cond)
    others = jnp.arange(BATCH) != 2
    t2, x2, cond2 = (
        jnp.where(others.reshape((-1,) + (1,) * (a.ndim - 1)), -3 * a + 1, a)
        for a in (t, x, cond)
    )
    assert (net(t2, x2, cond2)[2] == out[2]).all()
    assert not close(net(t2, x2, cond2)[1], out[1])
    assert close(net(t[2:3], x[2:3], cond[2:3])[0], out[2])


@every_network
def test_time_and_condition_matter_one_sample_at_a_time(cls, float32):
    t, x, cond = inputs(cls)
    net = jax.jit(moved(cls, COND))
    out = net(t, x, cond)
    for changed in (net(t.at[1].add(0.5), x, cond), net(t, x, cond.at[1].add(0.5))):
        assert abs(changed - out)[1].max() > 1e-3
        assert (jnp.delete(changed, 1, axis=0) == jnp.delete(out, 1, axis=0)).all()


@every_network
def test_one_time_with_a_condition_each_is_allowed(cls, float32):
    t, x, cond = inputs(cls)
    net = jax.jit(moved(cls, COND))
    assert close(net(t[0], x, cond), net(jnp.full(BATCH, t[0]), x, cond))


@every_network
def test_conditions_that_do_not_fit_are_refused(cls, float32):
    t, x, cond = inputs(cls)
    with pytest.raises(
        ValueError, match=r"made for a condition .*\(batch, 4\), got none"
    ):
        fresh(cls, COND)(t, x)
    with pytest.raises(ValueError, match=r"got one of shape \(5, 3\)"):
        fresh(cls, COND)(t, x, cond[:, :3])
    with pytest.raises(ValueError, match="made without a condition, got one"):
        fresh(cls)(t, x, cond)


@every_network
def test_samples_of_another_shape_are_refused(cls, float32):
    t, x, _ = inputs(cls)
    for bad in (x[..., :1], x[..., None], x[0][None, None]):
        with pytest.raises(
            ValueError, match=f"this {cls.__name__} was made for x of shape"
        ):
            fresh(cls)(t[0], bad)


@every_network
def test_bfloat16_computes_less_and_stores_the_same(cls, float32):
    t, x, _ = inputs(cls)
    half, full = moved(cls, dtype=jnp.bfloat16), moved(cls)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(half))
    assert eqx.tree_equal(jax.tree.leaves(half), jax.tree.leaves(full))
    out, exact = jax.jit(half)(t, x), jax.jit(full)(t, x)
    assert out.dtype == jnp.bfloat16
    # eight bits of mantissa, a few layers: percents, and not nothing
    assert close(out, exact, 5e-2)
    assert not close(out, exact, 1e-5)


@every_network
def test_parameters_are_float32_under_x64_too(cls):
    shape, sizes = MAKE[cls]
    network = init(lambda rngs: cls(shape, rngs=rngs, **sizes), jax.random.key(0))
    assert {p.dtype for p in jax.tree.leaves(network)} == {jnp.dtype("float32")}


@every_network
def test_initialisation_is_a_function_of_the_key(cls, float32):
    again = fresh.__wrapped__(cls, 0, None, 0)
    assert eqx.tree_equal(again, fresh(cls))
    other = fresh(cls, seed=3)
    assert not eqx.tree_equal(other, fresh(cls))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda r: type(r[2]).__name__)
def test_a_recipe_makes_its_network_and_hashes(recipe, float32):
    cls, shape, make = recipe
    a, b, c = (make(shape, jax.random.key(seed)) for seed in (0, 0, 1))
    assert type(a) is cls and a.shape == shape
    assert eqx.tree_equal(a, b) and not eqx.tree_equal(a, c)
    assert hash(make) == hash(type(make)(**vars(make)))  # frozen, so usable as a key


# -- the UNet --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 8, 1), (8, 6, 1), (8, 8), (2, 2, 1)])
def test_a_unet_refuses_sides_that_it_cannot_halve(shape, float32):
    with pytest.raises(ValueError, match="divisible by 4 .*halves them 2 times"):
        UNet(shape, channels=8, multiples=(1, 1, 1), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("multiples", [(1,), (2, 1), (1, 2, 3)])
def test_a_unet_works_at_any_depth_on_images_that_are_not_square(multiples, float32):
    net = init(
        lambda rngs: UNet(
            (8, 4, 3), channels=4, multiples=multiples, blocks=1, rngs=rngs
        ),
        jax.random.key(0),
    )
    net = direction(net, 1, 0.1)
    x = jax.random.normal(jax.random.key(2), (2, 8, 4, 3))
    out = jax.jit(net)(jnp.float32(0.1), x)
    # Attention at the lowest resolution: every pixel sees every other.
    far = jax.jit(net)(jnp.float32(0.1), x.at[0, 0, 0, 0].add(1.0))
    assert abs(far - out)[0, -1, -1].max() > 0
    assert (far[1] == out[1]).all()


# -- the convolution -------------------------------------------------------------------


def plain(x, w):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)


def images(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def agree(transform, *arguments):
    """transform(conv) and transform(lax's) give the same arrays on `arguments`."""
    got, expected = (jax.jit(transform(f))(*arguments) for f in (conv, plain))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert abs(a - b).max() < 1e-12 * (1 + abs(b).max())


SIZES = pytest.mark.parametrize(
    "k, height, width", [(1, 4, 5), (3, 4, 5), (5, 6, 7), (5, 2, 3)]
)


@SIZES
def test_conv_has_the_values_and_gradients_of_lax(k, height, width):
    x, w, dx, dw, dy = images(
        *2 * [(2, height, width, 3), (k, k, 3, 4)], (2, height, width, 4)
    )
    agree(lambda f: f, x, w)
    agree(lambda f: lambda *a: jax.jvp(f, a[:2], a[2:]), x, w, dx, dw)
    agree(lambda f: lambda x, w, dy: jax.vjp(f, x, w)[1](dy), x, w, dy)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (3, None), (2, 4)])
def test_conv_under_vmap_is_lax_under_vmap(axes):
    x, w, dy = images((2, 4, 5, 3), (3, 3, 3, 4), (6, 2, 4, 5, 4))
    mapped = [
        a if i is None else jnp.stack([a * s for s in range(1, 7)], i)
        for a, i in zip((x, w), axes, strict=True)
    ]
    agree(lambda f: jax.vmap(f, axes), *mapped)
    agree(
        lambda f: jax.vmap(lambda x, w, dy: jax.vjp(f, x, w)[1](dy), (*axes, 0)),
        *mapped,
        dy,
    )


def test_conv_under_two_vmaps_is_lax_under_two_vmaps():
    x, w = images((2, 3, 2, 4, 5, 3), (2, 3, 3, 3, 4))
    agree(lambda f: jax.vmap(jax.vmap(f, (0, None))), x, w)
    agree(lambda f: jax.vmap(jax.vmap(f, (0, None)), (0, 0), 3), x, w)


def test_conv_has_the_second_derivatives_of_lax():
    x, w = images((1, 3, 2, 2), (3, 3, 2, 2))

    def energy(f):
        return lambda x, w: jnp.sum(jnp.sin(f(x, w)) ** 2)

    for i, j in itertools.product((0, 1), repeat=2):
        agree(lambda f, i=i, j=j: jax.jacfwd(jax.grad(energy(f), i), j), x, w)
    agree(lambda f: jax.jacrev(jax.grad(energy(f), 1), 0), x, w)


def test_conv_keeps_bfloat16():
    x, w = (a.astype(jnp.bfloat16) for a in images((2, 4, 4, 3), (3, 3, 3, 4)))
    out = conv(x, w)
    assert out.dtype == jnp.bfloat16
    exact = plain(x.astype(jnp.float32), w.astype(jnp.float32))
    assert close(out, exact, 2**-8)


def test_gradients_inside_a_scan_are_as_fast_as_at_top_level(float32):
    """lax's own are 30 times slower there on a CPU; 5 leaves room for a busy machine."""
    calls = 10
    x, w = images((8, 16, 16, 16), (3, 3, 16, 16))

    def gradient(w):
        return jax.grad(lambda w: jnp.mean(conv(jax.nn.silu(conv(x, w)), w) ** 2))(w)

    one = jax.jit(lambda w: w - 0.1 * gradient(w))

    @jax.jit
    def scanned(w):
        def body(w, _):
            return w - 0.1 * gradient(w), None

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
