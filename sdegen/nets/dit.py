"""DiT: a transformer on the patches of an image (Peebles and Xie 2023).

    h <- h + g1 attention(s1 norm(h) + b1),   h <- h + g2 mlp(s2 norm(h) + b2)      (1)

where a linear map of the embedding of time and condition gives g, s - 1 and b. It
starts at zero ("adaLN-zero"): a new block is the identity, a new network returns zero.

Deliberate differences: t = log(sigma / alpha) / 4 spans about 4 and not 1000, so it is
multiplied by 250; "no class" is a condition of zeros; the positions are constants.
"""

import dataclasses
import functools
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from .embeddings import positional
from .layers import attend, check_sides, dropout, fold_in
from .network import AbstractNetwork, AbstractNetworkConfig

_STEPS = 250.0  # of the paper's times in one of ours
_FREQUENCIES = 256  # features of time
_XAVIER = nnx.initializers.glorot_uniform()
_SMALL = nnx.initializers.normal(0.02)
_ZEROS = nnx.initializers.zeros
_plain_norm = functools.partial(
    nnx.LayerNorm, epsilon=1e-6, use_bias=False, use_scale=False
)


def positions(rows: int, columns: int, width: int) -> np.ndarray:
    """(rows * columns, width): sin and cos of each patch's row and of its column."""
    w = 1e-4 ** (np.arange(width // 4) / (width // 4))
    phases = [place.reshape(-1, 1) * w for place in np.mgrid[:rows, :columns]]
    return np.concatenate([f(p) for p in phases for f in (np.sin, np.cos)], axis=-1)


def patches(x: Float[Array, "batch h w c"], p: int) -> Float[Array, "batch n features"]:
    """The image as a sequence of patches of p x p pixels, row by row."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def image(h: Array, rows: int, columns: int, p: int) -> Float[Array, "batch h w c"]:
    """The inverse of `patches`."""
    h = h.reshape(len(h), rows, columns, p, p, -1).swapaxes(2, 3)
    return h.reshape(len(h), rows * p, columns * p, -1)


class DiTBlock(nnx.Module):
    """Equation (1), on (batch, patches, width)."""

    def __init__(self, width: int, heads: int, *, dropout: float, **options):
        def linear(inputs, outputs, init=_XAVIER):
            return nnx.Linear(inputs, outputs, kernel_init=init, **options)

        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = (_plain_norm(width, **options) for _ in range(2))
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)
        self.modulation = linear(width, 6 * width, _ZEROS)

    def __call__(self, h, emb, key=None):
        """The block at embedding (width,) or (batch, width)."""
        changes = self.modulation(nnx.silu(emb))[..., None, :]
        b1, s1, g1, b2, s2, g2 = jnp.split(changes, 6, axis=-1)
        qkv = self.qkv(self.norm1(h) * (1 + s1) + b1)
        r = self.out(attend(qkv.reshape(*h.shape[:2], 3, self.heads, -1)))
        h = h + g1 * dropout(r, self.dropout, fold_in(key, 0))
        r = self.down(nnx.gelu(self.up(self.norm2(h) * (1 + s2) + b2)))
        return h + g2 * dropout(r, self.dropout, fold_in(key, 1))


class DiffusionTransformer(AbstractNetwork):
    """DiT, for images whose sides are multiples of the patch.

    **Arguments:**
    - `shape`: of one image, (height, width, channels).
    - `width`: features of a patch, a multiple of 4 and of `heads`, default 384.
    - `depth`: blocks, default 12.
    - `heads`: of the attention, default 6.
    - `patch`: its side in pixels, default 2.
    - `out_channels`: of the output, default those of x; twice that in the paper.
    - `dropout`: of each branch's output, default 0.
    - `cond_dim`, `remat`, `dtype`, `param_dtype`, `rngs`: as in `AbstractUNet`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        patch: int = 2,
        cond_dim: int = 0,
        out_channels: int | None = None,
        dropout: float = 0.0,
        remat: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sides(self, shape, patch, f"the patch, {patch}")
        if width % heads or width % 4:
            came = f"{width} and {heads}"
            raise ValueError(f"width must be a multiple of heads and of 4, got {came}.")
        self.shape, self.patch, self.width = tuple(shape), patch, width
        self.cond_dim, self.remat = cond_dim, remat
        whole = {"param_dtype": param_dtype, "rngs": rngs}  # time is not rounded
        options = {"dtype": dtype, **whole}

        def linear(inputs, outputs, init, **options):
            return nnx.Linear(inputs, outputs, kernel_init=init, **options)

        self.first = linear(patch**2 * shape[-1], width, _XAVIER, **options)
        self.map1 = linear(_FREQUENCIES, width, _SMALL, **whole)
        self.map2 = linear(width, width, _SMALL, **whole)
        cond = functools.partial(linear, cond_dim, width, _SMALL, use_bias=False)
        self.cond = cond(**whole) if cond_dim else None
        self.blocks = nnx.List(
            [DiTBlock(width, heads, dropout=dropout, **options) for _ in range(depth)]
        )
        self.norm = _plain_norm(width, **options)
        self.modulation = linear(width, 2 * width, _ZEROS, **options)
        channels = out_channels or shape[-1]
        self.last = linear(width, patch**2 * channels, _ZEROS, **options)

    def embed(self, t, cond):
        """The embedding of time and condition."""
        emb = self.map2(nnx.silu(self.map1(positional(_STEPS * t, _FREQUENCIES))))
        return emb if self.cond is None else emb + self.cond(cond)

    def predict(self, x, emb, key):
        """The prediction for x."""
        rows, columns = (side // self.patch for side in self.shape[:2])
        h, run = self.first(patches(x, self.patch)), self.runner(emb, key)
        h = h + jnp.asarray(positions(rows, columns, self.width), h.dtype)
        for block in self.blocks:
            h = run(block, h)
        changes = self.modulation(nnx.silu(emb))[..., None, :]
        shift, scale = jnp.split(changes, 2, axis=-1)
        h = self.last(self.norm(h) * (1 + scale) + shift)
        return image(h, rows, columns, self.patch)


_SIZES = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}


@dataclasses.dataclass(frozen=True)
class DiTConfig(AbstractNetworkConfig):
    """DiT; the paper names its networks by size and patch, DiT-XL/2."""

    network, presets = DiffusionTransformer, _SIZES
    size: Literal["S", "B", "L", "XL"] = "S"
    """Width, depth and heads: 384, 12, 6; 768, 12, 12; 1024, 24, 16; 1152, 28, 16."""
    patch: int = 2  # side of a patch in pixels
    width: int | None = None  # features of a patch, in place of those of `size`
    depth: int | None = None  # blocks, in place of those of `size`
    heads: int | None = None  # of the attention, in place of those of `size`
