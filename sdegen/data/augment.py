"""Random changes of training images: pure functions `(key, x) -> x` of one image.

x is (h, w, c), uint8 or floating; shape and dtype are kept. Functions made with equal
arguments are equal, so making one again does not compile again.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp

from ..typing import RandomKey

Augment: TypeAlias = Callable[[RandomKey, Any], Any]


def flip(key: RandomKey, x: Any) -> jax.Array:
    """The image, or with probability one half its mirror image (left and right).

    **Arguments:**
    - `key`: the random key.
    - `x`: the image, (h, w, c).
    """
    x = _image(x)
    return jnp.where(jax.random.bernoulli(key), x[:, ::-1], x)


def shift(pixels: int, padding: str = "reflect") -> Augment:
    """An augmentation that moves an image uniformly along both sides.

    **Arguments:**
    - `pixels`: the largest move, in either direction.
    - `padding`: what enters at the border, "reflect" (the default), the image mirrored
      about its outermost pixels, or "zero" (black for uint8, grey for [-1, 1]).
    """
    if pixels < 0 or padding not in ("reflect", "zero"):
        raise ValueError(
            'shift needs pixels >= 0 and padding "reflect" or "zero", got '
            f"{pixels} and {padding!r}."
        )
    return eqx.Partial(_shift, pixels, padding)


def compose(*augments: Augment) -> Augment:
    """Several augmentations, one after the other.

    **Arguments:**
    - `augments`: the functions `(key, x) -> x`; each gets a key of its own.
    """
    return eqx.Partial(_compose, augments)


def _shift(pixels, padding, key, x):
    x = _image(x)
    height, width, _ = x.shape
    if padding == "reflect" and pixels >= min(height, width):
        raise ValueError(
            f"a reflection reaches no further than the image: shift by {pixels} pixels "
            f"of {height} x {width}. Use fewer, or padding zero."
        )
    mode = "constant" if padding == "zero" else padding
    padded = jnp.pad(x, ((pixels, pixels), (pixels, pixels), (0, 0)), mode=mode)
    down, right = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
    return jax.lax.dynamic_slice(padded, (down, right, 0), x.shape)


def _compose(augments, key, x):
    for i, augment in enumerate(augments):
        x = augment(jax.random.fold_in(key, i), x)
    return x


def _image(x):
    x = jnp.asarray(x)
    if x.ndim != 3:
        raise ValueError(
            "augmentations take one image (height, width, channels), got shape "
            f"{x.shape}. Use jax.vmap over a batch, with one key for each image."
        )
    return x
