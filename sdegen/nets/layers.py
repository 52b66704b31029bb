"""What the networks share: resampling, dropout, attention, normalisation.

NCSN++ changes the resolution by the filter f = [1, 3, 3, 1] / 8 (StyleGAN2's, Karras et
al. 2020), with zeros beyond the border:

    down:  y_i = sum_k f_k x_{2i + k - 1},   k = 0 .. 3                             (1)
    up:    y_{2i} = (3 x_i + x_{i-1}) / 4,   y_{2i+1} = (3 x_i + x_{i+1}) / 4       (2)
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..typing import DropoutKey

Image: TypeAlias = Float[Array, "batch *_space c"]
"""Channels last, with any number of spatial axes."""


_KINDS = {
    0: "vectors (features,)",
    1: "series (length, channels)",
    2: "images (height, width, channels)",
    3: "volumes or videos (depth, height, width, channels)",
}


def check_sides(
    network: Any, shape: tuple[int, ...], divisor: int, what: str, axes=(2,)
) -> None:
    """Refuse samples with other spatial axes, or sides that `divisor` does not divide.

    `what` says what the divisor is, in a sentence that begins with the network.
    """
    name, kind = type(network).__name__, _KINDS.get(len(shape) - 1, "another shape")
    if len(shape) - 1 not in axes:
        takes = ", ".join(_KINDS[n] for n in axes)
        raise ValueError(
            f"{name} needs {takes}, got {shape}: {kind}. nets.UNetConfig is for "
            "series, images and volumes, nets.MLPConfig for vectors."
        )
    if any(side % divisor for side in shape[:-1]):
        raise ValueError(
            f"{name} needs {kind} with sides divisible by {what}, got {shape}. Pad "
            "them."
        )


def check_halvings(network: Any, shape, halvings: int, axes=(2,)) -> None:
    """Refuse samples whose sides cannot be halved `halvings` times."""
    what = f"{2**halvings} (it halves them {halvings} times, the number of `multiples`"
    check_sides(network, shape, 2**halvings, f"{what} less 1)", axes)


def down(x: Image, fir: bool = False, *, padded: bool = False) -> Image:
    """Half the resolution: means over 2 x 2 pixels (2 points), or (1) if `fir`.

    With `padded`, x includes the one pixel beyond each border that the filter needs.
    """
    space = range(1, x.ndim - 1)
    if not fir:
        pairs = [n for side in x.shape[1:-1] for n in (side // 2, 2)]
        x = x.reshape(x.shape[0], *pairs, x.shape[-1])
        return x.mean(tuple(2 * axis for axis in space))
    for axis in space:
        y = x if padded else _pad(x, axis)
        last = y.shape[axis] - 3
        taps = [jax.lax.slice_in_dim(y, k, last + k, 2, axis) for k in range(4)]
        x = (taps[0] + 3 * (taps[1] + taps[2]) + taps[3]) / 8
    return x


def up(x: Image, fir: bool = False) -> Image:
    """Twice the resolution: every pixel twice along each axis, or (2) if `fir`."""
    for axis in range(1, x.ndim - 1):
        if not fir:
            x = x.repeat(2, axis)
            continue
        y, n = _pad(x, axis), x.shape[axis]
        sides = [jax.lax.slice_in_dim(y, k, n + k, 1, axis) for k in (0, 2)]
        both = jnp.stack([(3 * x + side) / 4 for side in sides], axis + 1)
        x = both.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
    return x


def _pad(x, axis):
    return jnp.pad(x, [(int(a == axis),) * 2 for a in range(x.ndim)])


def resample(x: Image, mode: str, fir: bool = False) -> Image:
    """x at half ("down"), twice ("up") or the same ("keep") resolution."""
    return x if mode == "keep" else {"down": down, "up": up}[mode](x, fir)


def dropout(x: Array, rate: float, key: DropoutKey | None) -> Array:
    """x with a share `rate` of its numbers set to zero and the others scaled up.

    Without a key, x. The draw of sample i does not depend on the size of the batch.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1, got {rate}.")
    if key is None or rate == 0:
        return x
    if key.ndim:  # one key per sample
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - rate, x.shape[1:]))(key)
    else:
        keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def fold_in(key: DropoutKey | None, number: int) -> DropoutKey | None:
    """The key of block `number`, or one for each sample; no key gives none."""
    if key is None:
        return None
    fold = jax.random.fold_in
    return jax.vmap(fold, (0, None))(key, number) if key.ndim else fold(key, number)


def call(block, *arguments, remat: bool):
    """block(*arguments); with `remat`, gradients compute what is inside again."""
    if not remat:
        return block(*arguments)
    return jax.checkpoint(lambda block, *a: block(*a))(block, *arguments)


def attend(qkv: Float[Array, "batch length 3 heads d"]) -> Array:
    """softmax(q k / sqrt(d)) v for every head, (batch, length, heads * d)."""
    out = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0))
    return out.reshape(*out.shape[:2], -1)


def group_norm(features: int, **options) -> nnx.GroupNorm:
    """Group normalisation with 32 groups, or fewer of at least 4 features each."""
    most = min(32, max(1, features // 4))
    groups = max(g for g in range(1, most + 1) if features % g == 0)
    return nnx.GroupNorm(features, groups, **options)
