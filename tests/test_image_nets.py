"""The networks for images against their papers and against other programs.

Counts of parameters come from the layer lists of the papers, block by block; filters
from SciPy, blocks from NumPy in float64, magnitudes from quadrature. What every network
has in common is tested in `test_nets`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax import nnx
from jax.sharding import AxisType

from sdegen import nets
from sdegen.nets import abstract_unet, blocks, dit, edm2, embeddings, layers, ncsnpp
from sdegen.nets import magnitude_preserving as magnitude
from sdegen.nets.conv import conv

TINY = {"channels": 4, "multiples": (1,), "blocks": 1}
MAKE = {
    nets.MLP: {"width": 8, "depth": 2},
    nets.UNet: TINY,
    nets.ScoreUNet: TINY | {"ncsn": True},
    nets.ADMUNet: TINY,
    nets.EDM2UNet: TINY,
    nets.DiffusionTransformer: {"width": 8, "depth": 2, "heads": 2},
}
SHAPE, BATCH, COND = (4, 4, 2), 5, 3
every_network = pytest.mark.parametrize("cls", MAKE, ids=lambda c: c.__name__)


def noisy(make, seed=0):
    """A network with noise on every parameter, without compiling its initialisers."""
    rng = np.random.default_rng(seed)
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    return jax.tree.map(
        lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), abstract
    )


@functools.cache
def network(cls, **options):
    options = {"cond_dim": COND} | MAKE[cls] | options
    return noisy(lambda rngs: cls(SHAPE, rngs=rngs, **options))


def inputs(batch=BATCH):
    rng = np.random.default_rng(1)
    shapes = (BATCH,), (BATCH, *SHAPE), (BATCH, COND)
    return [jnp.asarray(rng.normal(size=s), jnp.float32)[:batch] for s in shapes]


def close(a, b, tolerance=2e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a.shape == b.shape and abs(a - b).max() <= tolerance * (1 + abs(b).max())


# -- parameters ------------------------------------------------------------------------


def count(recipe, shape, **options):
    make = lambda key: recipe.make(shape, rngs=nnx.Rngs(key), **options)  # noqa: E731
    tree = jax.eval_shape(make, jax.random.key(0))
    return sum(p.size for p in jax.tree.leaves(tree))


def weights(inputs, outputs, size=1, bias=True):
    return size**2 * inputs * outputs + bias * outputs


def res_count(i, o, width, attention=False, film=False, project=False):
    """Karras et al. 2022, appendix F: the parameters of one residual block."""
    n = 2 * i + weights(i, o, 3) + 2 * o + weights(o, o, 3)
    n += weights(width, (1 + film) * o)
    n += weights(i, o) if project or i != o else 0
    return n + attention * (2 * o + weights(o, 3 * o) + weights(o, o))


def mp_count(i, o, width, attention=False, encodes=False):
    """Karras et al. 2024, figure 21: the same, weights without biases and one gain."""
    n = 9 * (o if encodes else i) * o + 9 * o * o + width * o + 1
    return n + (i * o if i != o else 0) + attention * 4 * o * o


def test_blocks_have_the_parameters_that_edm_prints():
    # The summaries of training logs of NVlabs/edm, CIFAR-10, 4 x 4 pixels: block0 and
    # in0 (attention), down (a projection), block0 of the decoder.
    options = {"dropout": 0.1, "param_dtype": jnp.float32}
    places = {
        blocks.Place(256, 256): 1_312_512,
        blocks.Place(256, 256, attention=True): 1_576_192,
        blocks.Place(256, 256, resample="down"): 1_378_304,
        blocks.Place(512, 256, joins=True): 2_034_176,
    }
    for place, expected in places.items():
        block = nnx.eval_shape(
            lambda place=place: blocks.ResBlock(
                place, 512, ncsnpp._DDPMPP, rngs=nnx.Rngs(0), **options
            )
        )
        assert sum(p.size for p in jax.tree.leaves(block)) == expected
    assert res_count(512, 256, 512) == 2_034_176
    assert res_count(256, 256, 512, attention=True) == 1_576_192


def test_ddpmpp_and_ncsnpp_have_the_parameters_of_the_paper():
    # Channels 128: features of encoder and decoder inputs in units of 128, CIFAR-10.
    down, up = (1, 2, 2, 2), (4, 4, 4, 4, 3)
    res = functools.partial(res_count, width=512)
    n = weights(3, 128, 3) + 2 * 256 + weights(256, 3, 3)  # first, norm, last
    n += sum(res(128 * i, 256) for i in (2,) * 8)  # 16 x 16 and 8 x 8, encoder
    n += sum(res(128 * i, 256) for i in down)
    n += 2 * res(256, 256, project=True) * 2  # down, down, up, up
    n += res(256, 256, attention=True) + res(256, 256)  # the middle
    n += sum(res(128 * i, 256) for i in (4,) * 10 + up)
    n += 5 * (2 * 256 + weights(256, 768) + weights(256, 256))  # attention at 16 x 16
    ddpmpp = n + weights(128, 512) + weights(512, 512)
    assert (
        count(nets.DDPMppConfig(), (32, 32, 3)) == ddpmpp == 55_732_739
    )  # paper: 55.7M
    # twice the features of time, and the image at 16 x 16 and 8 x 8
    ncsnpp = n + weights(256, 512) + weights(512, 512)
    ncsnpp += weights(3, 256, 3) + weights(256, 256, 3)
    assert count(nets.NCSNppConfig(), (32, 32, 3)) == ncsnpp == 56_395_523  # paper: 56M


MULTIPLES = (1, 2, 3, 4)
DOWN = {1: (1, 1, 1), 2: (1, 2, 2), 3: (2, 3, 3), 4: (3, 4, 4)}
UP = {1: (3, 2, 2, 2), 2: (5, 4, 4, 3), 3: (7, 6, 6, 5), 4: (8, 8, 8, 7)}
"""Features of the blocks' inputs in units of `channels`, by the features of outputs."""


def test_adm_has_the_parameters_of_the_paper():
    c, width = 192, 768
    res = functools.partial(res_count, width=width, film=True)
    n = weights(3, c, 3) + 2 * c + weights(c, 3, 3)
    n += weights(c, width) + weights(width, width) + 1000 * width
    for m in MULTIPLES:  # attention at 32, 16, 8 pixels
        n += sum(res(i * c, m * c, attention=m > 1) for i in DOWN[m] + UP[m])
    n += sum(res(m * c, m * c) for m in (1, 2, 3))  # down
    n += sum(res(m * c, m * c) for m in (2, 3, 4))  # up
    n += res(4 * c, 4 * c, attention=True) + res(4 * c, 4 * c)
    assert (
        count(nets.ADMConfig(), (64, 64, 3), cond_dim=1000) == n == 295_899_267
    )  # 296M


@pytest.mark.parametrize(
    "size, channels, published",
    [
        ("XS", 128, 124.7),
        ("S", 192, 280.2),
        ("M", 256, 497.8),
        ("L", 320, 777.5),
        ("XL", 384, 1119.3),
        ("XXL", 448, 1523.2),
    ],
)
def test_edm2_has_the_parameters_of_the_paper(size, channels, published):
    c, width = channels, 4 * channels
    n = 9 * 5 * c + 9 * c * 4 + 1 + c * width + 1000 * width
    for m in MULTIPLES:  # 64 x 64 x 4, attention at 16 and 8
        on, out = {"attention": m > 2}, m * c
        n += sum(mp_count(i * c, out, width, encodes=True, **on) for i in DOWN[m])
        n += sum(mp_count(i * c, out, width, **on) for i in UP[m])
    n += sum(mp_count(m * c, m * c, width) for m in (1, 2, 3, 2, 3, 4))
    n += mp_count(4 * c, 4 * c, width, True) + mp_count(4 * c, 4 * c, width)
    # The paper's figure has 128 more: the log-variance of its loss.
    assert round((n + 128) / 1e6, 1) == published
    if size in ("XS", "XXL"):
        assert count(nets.EDM2Config(size), (64, 64, 4), cond_dim=1000) == n
    assert edm2._CHANNELS[size] == channels


@pytest.mark.parametrize(
    "size, patch, width, depth, published",
    [("S", 2, 384, 12, 33), ("B", 2, 768, 12, 130), ("XL", 2, 1152, 28, 675)],
)
def test_dit_has_the_parameters_of_the_paper(size, patch, width, depth, published):
    block = 18 * width**2 + 15 * width  # qkv, out, 4 + 4 and 6 in weights; biases
    n = depth * block + 2 * width**2 + 2 * width + weights(width, 8 * patch**2)
    n += weights(4 * patch**2, width) + weights(256, width) + weights(width, width)
    n += 1000 * width
    made = count(
        nets.DiTConfig(size, patch), (32, 32, 4), cond_dim=1000, out_channels=8
    )
    assert made == n
    # The published code counts its fixed positions and a row for "no class" too; it
    # prints 675,129,632 for DiT-XL/2.
    assert round((n + width) / 1e6) == published
    if size == "XL":
        assert n + width + 256 * width == 675_129_632


# -- dropout, rematerialisation, precision ---------------------------------------------


@every_network
def test_a_key_is_the_only_source_of_chance(cls, float32):
    net, calm = network(cls, dropout=0.5), network(cls, dropout=0.0)
    one, two = jax.random.split(jax.random.key(0))
    t, x, cond = inputs()

    def both(net, key):
        return net(t, x, cond), net(t, x, cond, key=key)

    run = jax.jit(both)
    without, first = run(net, one)
    assert (run(net, one)[1] == first).all()
    assert not close(run(net, two)[1], first) and not close(first, without)
    # The same parameters without dropout: the same program without a key, and no chance
    # in the one with a key.
    calls = [jax.make_jaxpr(lambda n: n(t, x, cond))(n) for n in (net, calm)]
    assert str(calls[0]) == str(calls[1])
    chance = ["random_bits" in str(jax.make_jaxpr(both)(n, one)) for n in (net, calm)]
    assert chance == [True, False]


def test_dropout_keeps_the_mean():
    x = jnp.arange(1.0, 5.0)
    keys = jax.random.split(jax.random.key(0), 4000)
    out = jax.vmap(lambda key: layers.dropout(x, 0.25, key))(keys)
    assert jnp.isclose(out, 0).sum() + jnp.isclose(out, x / 0.75).sum() == out.size
    # A map that is linear in what is dropped: its mean is the map without a key.
    a = jnp.asarray([1.0, -2.0, 0.5, 3.0])
    values = out @ a
    error = values.std() / np.sqrt(len(keys))
    print("mean", values.mean(), "+-", error, "expected", x @ a)
    assert abs(values.mean() - x @ a) < 5 * error
    assert abs((out == 0).mean() - 0.25) < 5 * np.sqrt(0.1875 / out.size)
    assert (layers.dropout(x, 0.25, None) == x).all()
    # A sample does not know how large its batch is.
    assert (
        layers.dropout(out[:3], 0.25, keys[0]) == layers.dropout(out, 0.25, keys[0])[:3]
    ).all()
    with pytest.raises(ValueError, match="at least 0 and less than 1, got 1"):
        layers.dropout(x, 1.0, keys[0])


def test_blocks_drop_different_features():
    # Two blocks of the same parameters differ only by their keys.
    net = network(nets.MLP, dropout=0.5)
    h, emb = jnp.ones((BATCH, 8)), jnp.ones(8)
    one, two = (layers.fold_in(jax.random.key(0), n) for n in (0, 1))
    assert not close(net.blocks[0](h, emb, one), net.blocks[0](h, emb, two))
    assert layers.fold_in(None, 3) is None


@every_network
def test_rematerialised_gradients_are_the_gradients(cls, float32):
    nets_ = [network(cls, dropout=0.5, remat=remat) for remat in (False, True)]
    structure = [jax.tree.structure(net) for net in nets_]
    leaves = jax.tree.leaves(nets_[0])
    t, x, cond = inputs()

    def loss(leaves, x, which):
        net = jax.tree.unflatten(structure[which], leaves)
        out = net(t, x, cond, key=jax.random.key(2))
        return jnp.sum(jnp.sin(3 * out))

    def gradients(leaves, x):
        return [
            jax.value_and_grad(loss, argnums=(0, 1))(leaves, x, which)
            for which in (0, 1)
        ]

    trace = jax.make_jaxpr(loss, static_argnums=2)
    programs = [str(trace(leaves, x, which)) for which in (0, 1)]
    blocks_ = sum(
        type(block).__name__ in ("ResBlock", "MPBlock", "DiTBlock", "MLPBlock")
        for _, block in nnx.iter_graph(nets_[0])
    )
    assert "checkpoint" not in programs[0] and "remat" not in programs[0]
    found = programs[1].count("checkpoint[") + programs[1].count("remat2[")
    assert found == blocks_ + (cls is nets.UNet)  # its attention stands alone
    if cls is nets.MLP:  # all networks rematerialise by the same function
        (value, plain), (again, remat) = jax.jit(gradients)(leaves, x)
        assert close(value, again)
        pairs = zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True)
        assert all(close(a, b, 1e-4) for a, b in pairs)


@every_network
def test_times_are_not_rounded_to_the_precision_of_the_layers(cls, float32):
    # In bfloat16 both are 1 or .996: any difference smaller than that would be lost.
    net = network(cls, dtype=jnp.bfloat16)
    _, x, cond = inputs()
    call = jax.jit(lambda t: net(t, x, cond))
    a, b = call(jnp.float32(0.9990)), call(jnp.float32(0.9985))
    assert jnp.bfloat16(0.9990) == jnp.bfloat16(0.9985)
    assert (a != b).any()


# -- recipes ---------------------------------------------------------------------------


def test_a_recipe_hands_on_what_it_is_told(float32):
    recipe = nets.DiTConfig(
        width=8, depth=1, heads=2, dropout=0.25, remat=True, dtype="bfloat16"
    )
    net = recipe(SHAPE, jax.random.key(0), cond_dim=COND)
    assert net.blocks[0].dropout == 0.25 and net.remat and net.cond_dim == COND
    t, x, cond = inputs()
    assert jax.eval_shape(net, t, x, cond).dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(net)} == {jnp.dtype("float32")}
    assert nets.DDPMppConfig().dropout == 0.13  # as the paper trains it


def test_parameters_are_born_on_the_mesh(float32):
    mesh = jax.make_mesh((8,), ("fsdp",), (AxisType.Auto,))
    recipe, key = nets.DiTConfig(width=128, depth=1, heads=2), jax.random.key(1)
    there, here = recipe(SHAPE, key, mesh=mesh), recipe(SHAPE, key)
    assert jax.tree.structure(there) == jax.tree.structure(here)
    assert all(map(close, jax.tree.leaves(there), jax.tree.leaves(here)))
    up = there.blocks[0].up.kernel.get_value()
    assert up.shape == (128, 512) and up.sharding.mesh == mesh
    assert up.sharding.shard_shape(up.shape) == (128, 64)


# -- resampling and residual blocks ----------------------------------------------------


def images(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s) for s in shapes]


def test_resampling_is_that_of_scipy():
    (x,) = images((2, 6, 8, 3))
    box, fir = np.ones(2) / 2, np.array([1, 3, 3, 1]) / 8
    for f, is_fir in ((box, False), (fir, True)):
        half, twice = (g(jnp.asarray(x), is_fir) for g in (layers.down, layers.up))
        for b in range(2):
            for c in range(3):
                plane, cut = x[b, :, :, c], len(f) // 2
                full = scipy.signal.convolve2d(plane, np.outer(f, f))
                expected = full[cut::2, cut::2][: half.shape[1], : half.shape[2]]
                assert close(half[b, :, :, c], expected, 1e-12)
                rare = np.zeros((12, 16))
                rare[::2, ::2] = plane
                full = scipy.signal.convolve2d(rare, 4 * np.outer(f, f))
                start = cut - 1
                expected = full[start : start + 12, start : start + 16]
                assert close(twice[b, :, :, c], expected, 1e-12)


def test_the_image_of_ncsnpp_is_convolved_and_filtered_in_one():
    # One linear filter, the product of both, on the image with zeros around it.
    x, w = images((1, 4, 6, 1), (3, 3, 1, 1))
    f = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    wide = jnp.pad(jnp.asarray(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = layers.down(conv(wide, jnp.asarray(w)), True, padded=True)
    both = scipy.signal.convolve2d(np.flip(w[:, :, 0, 0]), f)
    full = scipy.signal.convolve2d(x[0, :, :, 0], both)
    assert close(out[0, :, :, 0], full[3:-2:2, 3:-2:2], 1e-12)


def group_normed(x, groups, scale, bias, eps):
    rest = x.shape[:-1]
    y = x.reshape(*rest, groups, -1)
    axes = tuple(range(1, len(rest))) + (len(rest) + 1,)
    y = (y - y.mean(axes, keepdims=True)) / np.sqrt(y.var(axes, keepdims=True) + eps)
    return y.reshape(x.shape) * scale + bias


def correlated(x, layer):
    kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
    out = np.zeros((*x.shape[:3], kernel.shape[-1])) + bias
    for b, i, o in np.ndindex(x.shape[0], x.shape[3], kernel.shape[3]):
        out[b, :, :, o] += scipy.signal.correlate2d(
            x[b, :, :, i], kernel[:, :, i, o], "same"
        )
    return out


def linear(x, layer):
    bias = 0 if layer.bias is None else np.asarray(layer.bias[...])
    return x @ np.asarray(layer.kernel[...]) + bias


def attended(qkv, heads):
    """softmax(q k / sqrt(d)) v on (batch, n, 3 * width), head by head."""
    width = qkv.shape[-1] // 3
    d = width // heads
    out = np.zeros((*qkv.shape[:2], width))
    for b, head in np.ndindex(qkv.shape[0], heads):
        q, k, v = (
            qkv[b, :, i * width + head * d : i * width + (head + 1) * d]
            for i in range(3)
        )
        p = np.exp(q @ k.T / np.sqrt(d))
        out[b, :, head * d : (head + 1) * d] = p / p.sum(1, keepdims=True) @ v
    return out


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("film", [False, True])
def test_a_residual_block_is_its_equation(film):
    style = blocks.Style(
        film=film, scale=0.7, eps=1e-3, fir=False, project=False, head=4,
        init=nnx.initializers.normal(), init_attention=nnx.initializers.normal(),
    )  # fmt: skip
    place = blocks.Place(4, 8, attention=True, resample="up", joins=True)
    block = noisy(
        lambda rngs: blocks.ResBlock(
            place, 6, style, dropout=0.0, param_dtype=jnp.float64, rngs=rngs
        )
    )
    h, emb = images((2, 3, 2, 4), (2, 6))

    def normed(x, norm, groups):
        return group_normed(x, groups, norm.scale[...], norm.bias[...], style.eps)

    def doubled(x):
        return x.repeat(2, 1).repeat(2, 2)

    r = correlated(doubled(silu(normed(h, block.norm1, 1))), block.conv1)
    e = linear(emb, block.emb)[:, None, None, :]
    if film:
        r = normed(r, block.norm2, 2) * (1 + e[..., :8]) + e[..., 8:]
    else:
        r = normed(r + e, block.norm2, 2)
    out = 0.7 * (linear(doubled(h), block.skip) + correlated(silu(r), block.conv2))
    inner = block.attention
    qkv = linear(normed(out, inner.norm, 2), inner.qkv).reshape(2, -1, 24)
    a = linear(attended(qkv, 2).reshape(out.shape), inner.out)
    # the softmax is computed in float32
    assert close(
        jax.jit(block)(jnp.asarray(h), jnp.asarray(emb)), 0.7 * (out + a), 1e-6
    )


def test_the_plan_of_a_unet_leaves_no_skip_behind():
    encoder, decoder = abstract_unet.plan(16, 4, (4, 8), 2, (8,), attend_once=True)
    assert [p.outputs for p in encoder] == [4, 4, 4, 8, 8]
    assert [p.inputs for p in decoder] == [8, 8, 16, 16, 12, 8, 12, 8, 8]
    assert [p.resample for p in decoder].index("up") == 5
    assert [p.attention for p in encoder] == [False] * 3 + [True] * 2
    assert [p.attention for p in decoder] == [True] + [False] * 3 + [True] + [False] * 4


# -- EDM2 ------------------------------------------------------------------------------


def rms(x, axis=None):
    return np.sqrt(np.mean(np.asarray(x, np.float64) ** 2, axis))


def test_operations_keep_magnitudes():
    # Gauss-Hermite: the mean over x ~ N(0, 1) of the square of what comes out.
    points, mass = np.polynomial.hermite_e.hermegauss(80)
    square = magnitude.mp_silu(jnp.asarray(points)) ** 2 @ (mass / mass.sum())
    assert abs(square - 1) < 2e-3  # the paper rounds to three digits
    # Orthogonal inputs of magnitude 1 are as good as independent ones.
    a, b = jnp.asarray([1.0, 1, 1, 1]), jnp.asarray([1.0, -1, 1, -1])
    for m in (0.3, 0.5):
        assert abs(rms(magnitude.mp_sum(a, b, m)) - 1) < 1e-12
        for k in (4, 12):
            c = jnp.tile(b, k // 4)
            out = magnitude.mp_cat(a, c, m)
            assert abs(rms(out) - 1) < 1e-12
            share = jnp.sum(out[4:] ** 2) / jnp.sum(out**2)
            assert abs(share - m**2 / (m**2 + (1 - m) ** 2)) < 1e-12
    t = jnp.linspace(-2, 2, 9)
    assert abs(rms(magnitude.mp_fourier(t, 128), 1) - 1).max() < 0.1
    x = jnp.asarray(images((3, 5, 4))[0])
    assert abs(rms(magnitude.normalise(7 * x, -1), -1) - 1).max() < 1e-6


@pytest.mark.parametrize("size", [0, 3])
def test_a_weight_counts_by_its_direction(size):
    layer = noisy(
        lambda rngs: magnitude.MPConv(8, 6, size, param_dtype=jnp.float64, rngs=rngs)
    )
    (x,) = images((2, 5, 5, 8))
    v = np.asarray(layer.weight[...])
    w = 1.7 * v / np.sqrt((v**2).sum(tuple(range(v.ndim - 1))))
    plain = conv(jnp.asarray(x), jnp.asarray(w)) if size else x @ w
    assert close(layer(jnp.asarray(x), 1.7), plain, 1e-6)

    # So the gradient is orthogonal to every output's weight.
    gradient = jax.grad(lambda layer: jnp.sum(jnp.sin(layer(jnp.asarray(x)))))(layer)
    g = np.asarray(gradient.weight[...])
    along = (g * v).sum(tuple(range(v.ndim - 1)))
    assert abs(along).max() < 1e-6 * abs(g).max()


def test_normalised_weights_are_the_same_network(float32):
    net = network(nets.EDM2UNet)
    call = jax.jit(lambda net: net(*inputs()))

    def is_weight(p):
        return isinstance(p, magnitude.Weight)

    def lengthen(p):
        return p.replace(7 * p.get_value()) if is_weight(p) else p

    longer = jax.tree.map(lengthen, net, is_leaf=is_weight)
    again = nets.normalise_weights({"network": longer, "other": jnp.ones(2)})
    assert close(call(longer), call(net)) and close(call(again["network"]), call(net))
    assert (again["other"] == 1).all()
    assert jax.tree.structure(again["network"]) == jax.tree.structure(net)
    kinds = {}
    for _, p in nnx.iter_graph(again["network"]):
        if isinstance(p, nnx.Variable):
            kinds.setdefault(type(p), []).append(np.asarray(p.get_value()))
    assert set(kinds) == {magnitude.Weight, nnx.Param}
    for w in kinds[magnitude.Weight]:
        assert close(rms(w, tuple(range(w.ndim - 1))), np.ones(w.shape[-1]), 1e-5)
    assert {p.shape for p in kinds[nnx.Param]} == {()}  # the gains


def test_edm2_keeps_magnitudes_from_end_to_end(float32):
    net = nnx.eval_shape(
        lambda: nets.EDM2UNet(
            (8, 8, 2), channels=32, multiples=(1, 1), blocks=1, head=8, rngs=nnx.Rngs(0)
        )
    )
    rng = np.random.default_rng(3)  # as new, but for the gains, which are 1 here
    net = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape) if p.shape else 1.0, p.dtype),
        net,
    )
    x = jnp.asarray(rng.normal(size=(16, 8, 8, 2)), jnp.float32)
    out = jax.jit(net)(jnp.linspace(-1, 1, 16), x)
    # Zeros beyond the border and the gain of 1 on the embedding pull opposite ways.
    print("magnitude", rms(out))
    assert 0.6 < rms(out) < 1.4


# -- DiT -------------------------------------------------------------------------------


def test_a_new_dit_block_is_the_identity_and_a_trained_one_its_equation():
    width, heads = 8, 2
    options = {"param_dtype": jnp.float64, "dropout": 0.0}
    new = dit.DiTBlock(width, heads, rngs=nnx.Rngs(jax.random.key(0)), **options)
    h, emb = images((2, 5, width), (2, width))
    assert (jax.jit(new)(jnp.asarray(h), jnp.asarray(emb)) == h).all()
    assert rms(new.up.kernel[...]) > 0.1 and rms(new.out.kernel[...]) > 0.1

    block = noisy(lambda rngs: dit.DiTBlock(width, heads, rngs=rngs, **options))

    def normed(x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    changes = linear(silu(emb), block.modulation)[:, None, :]
    b1, s1, g1, b2, s2, g2 = np.split(changes, 6, axis=-1)
    qkv = linear(normed(h) * (1 + s1) + b1, block.qkv)
    out = h + g1 * linear(attended(qkv, heads), block.out)
    inner = gelu(linear(normed(out) * (1 + s2) + b2, block.up))
    out = out + g2 * linear(inner, block.down)
    assert close(jax.jit(block)(jnp.asarray(h), jnp.asarray(emb)), out, 1e-6)


def test_patches_are_pieces_of_the_image_in_order():
    (x,) = images((2, 4, 6, 3))
    cut = dit.patches(jnp.asarray(x), 2)
    assert cut.shape == (2, 6, 12)
    assert (cut[:, 4] == x[:, 2:4, 2:4].reshape(2, -1)).all()
    assert (dit.image(cut, 2, 3, 2) == x).all()
    places = dit.positions(2, 3, 8).reshape(2, 3, 8)
    # row 1, column 2, frequencies 1 and 1/100
    expected = [np.sin([1, 0.01]), np.cos([1, 0.01]), np.sin([2, 0.02])]
    expected = np.concatenate([*expected, np.cos([2, 0.02])])
    assert close(places[1, 2], expected, 1e-12)


def test_a_dit_without_positions_does_not_know_where_a_patch_is(float32, monkeypatch):
    net = network(nets.DiffusionTransformer)
    t, x, cond = inputs()
    order = jnp.asarray([3, 1, 0, 2])

    def moved(x):
        return dit.image(dit.patches(x, 2)[:, order], 2, 2, 2)

    def run(x):
        return net(t, x, cond)

    assert not close(jax.jit(run)(moved(x)), moved(jax.jit(run)(x)))
    monkeypatch.setattr(dit, "positions", lambda *a: np.zeros((4, 8)))
    again = jax.jit(lambda x: net(t, x, cond))
    assert close(again(moved(x)), moved(again(x)))


def test_a_dit_says_a_variance_too_when_asked(float32):
    net = network(nets.DiffusionTransformer, out_channels=4, cond_dim=0)
    t, x, _ = inputs()
    assert jax.eval_shape(net, t, x).shape == (BATCH, 4, 4, 4)


# -- features of time, sentences -------------------------------------------------------


def test_features_of_time_are_those_of_the_papers():
    t = jnp.asarray([0.3, -1.2])
    for endpoint in (False, True):
        out = embeddings.positional(t, 8, endpoint=endpoint)
        w = 10_000.0 ** -(np.arange(4) / (3 if endpoint else 4))
        assert close(out, np.hstack([np.cos(np.outer(t, w)), np.sin(np.outer(t, w))]))
    w = embeddings.normal_frequencies(4000, 16.0) / (2 * np.pi)
    assert abs(w.mean()) < 1e-6 and abs(w.std() - 16) < 0.05
    assert abs(np.quantile(w, 0.975) - 1.95996 * 16) < 0.05


@pytest.mark.parametrize("cls", [nets.ScoreUNet, nets.ADMUNet, nets.EDM2UNet])
def test_images_that_cannot_be_halved_are_refused(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__} needs .* divisible by 4 "):
        cls((6, 8, 1), channels=4, multiples=(1, 1, 1), rngs=nnx.Rngs(0))


def test_images_that_cannot_be_cut_are_refused():
    make = functools.partial(nets.DiffusionTransformer, depth=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="divisible by the patch, 4, got"):
        make((8, 6, 1), patch=4)
    with pytest.raises(ValueError, match="a multiple of heads and of 4, got 6 and 2"):
        make((8, 8, 1), width=6, heads=2)
