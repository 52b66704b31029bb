"""Random changes of training images: pure functions `(key, x) -> x` of one image.

x is (h, w, c), uint8 or floating; shape and dtype are kept. A training step applies one
to a batch as `jax.vmap(augment)(keys, x)`, with a key for each row. The functions
compare equal when their numbers do, so making one anew never compiles anew.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..typing import RandomKey


def flip(key: RandomKey, x: Any) -> jax.Array:
    """The image, or with probability one half its mirror image (left and right)."""
    x = _image(x)
    return jnp.where(jax.random.bernoulli(key), x[:, ::-1], x)


def shift(pixels: int, padding: str = "reflect") -> Callable[[RandomKey, Any], Any]:
    """Moves an image by -pixels to pixels along each side, uniformly.

    `padding` is what comes in at the border: "reflect", the image mirrored about its
    outermost pixels, or "zero" (black for uint8, grey for images in [-1, 1]).
    """
    if pixels < 0 or padding not in ("reflect", "zero"):
        raise ValueError(
            'shift needs pixels >= 0 and padding "reflect" or "zero", got '
            f"{pixels} and {padding!r}."
        )
    return eqx.Partial(_shift, pixels, padding)


def compose(
    *augments: Callable[[RandomKey, Any], Any],
) -> Callable[[RandomKey, Any], Any]:
    """One augmentation after the other, each with a key of its own."""
    return eqx.Partial(_compose, augments)


def _shift(pixels, padding, key, x):
    x = _image(x)
    height, width, channels = x.shape
    if padding == "reflect" and pixels >= min(height, width):
        raise ValueError(
            f"a reflection reaches no further than the image: shift by {pixels} pixels "
            f"of {height} x {width}. Use fewer pixels, or padding zero."
        )
    mode = "constant" if padding == "zero" else padding
    padded = jnp.pad(x, ((pixels, pixels), (pixels, pixels), (0, 0)), mode=mode)
    down, right = jax.random.randint(key, (2,), 0, 2 * pixels + 1)
    return jax.lax.dynamic_slice(padded, (down, right, 0), (height, width, channels))


def _compose(augments, key, x):
    for i, augment in enumerate(augments):
        x = augment(jax.random.fold_in(key, i), x)
    return x


def _image(x):
    x = jnp.asarray(x)
    if x.ndim != 3:
        raise ValueError(
            f"augmentations take one image (height, width, channels), got shape "
            f"{x.shape}. Use jax.vmap over a batch, with one key for each image."
        )
    return x
