"""ADM: the UNet of "Diffusion models beat GANs" (Dhariwal and Nichol 2021).

With the sizes that Karras et al. 2022, table 7, train on ImageNet at 64 x 64: 296
million parameters. Against DDPM++: wider, attention at three resolutions with heads of
64 features, the embedding scales and shifts, the condition enters after the time.

Different on purpose: biases start at zero, the paper draws them like the weights.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..typing import DropoutKey, Time
from .blocks import ResBlock, Style, plan
from .configs import AbstractRecipe
from .conv import Conv
from .embeddings import check_condition, positional
from .layers import call, check_sides, fold_in, group_norm
from .mlp import check_shape

_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_STYLE = Style(
    film=True,
    scale=1.0,
    eps=1e-5,
    fir=False,
    project=False,
    head=64,
    init=_INIT,
    init_attention=_INIT,
)


class ADMUNet(nnx.Module):
    """(t, x, cond) -> an array of the shape of x, for images of `shape` (h, w, c).

    **Arguments:** `channels`, the unit of features; `multiples`, of `channels` at each
    halving of the resolution; `blocks`, residual blocks per resolution (one more on the
    way up); `attention`, the heights in pixels with attention; `cond_dim`, the length
    of the condition vector (one-hot, or of about unit length; all zeros is no class), 0
    for none; `dropout`, the share of features that a call with a `key` sets to zero;
    `remat`, to compute each block again for gradients; `dtype`, to compute in;
    `param_dtype`, of the parameters.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        channels: int = 192,
        multiples: tuple[int, ...] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: tuple[int, ...] = (32, 16, 8),
        cond_dim: int = 0,
        dropout: float = 0.0,
        remat: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.shape = tuple(shape)
        check_sides(self, shape, len(multiples) - 1)
        self.cond_dim, self.remat, self.channels = cond_dim, remat, channels
        whole = {"param_dtype": param_dtype, "rngs": rngs}  # time is not rounded
        options, width = {"dtype": dtype, **whole}, 4 * channels
        self.map1 = nnx.Linear(channels, width, kernel_init=_INIT, **whole)
        self.map2 = nnx.Linear(width, width, kernel_init=_INIT, **whole)
        normal = nnx.initializers.normal(1.0)
        self.cond = nnx.data(
            nnx.Linear(cond_dim, width, use_bias=False, kernel_init=normal, **whole)
            if cond_dim
            else None
        )
        widths = [channels * multiple for multiple in multiples]
        self.first = Conv(shape[-1], widths[0], kernel_init=_INIT, **options)
        places = plan(shape[0], widths[0], widths, blocks, attention)
        self.encoder, self.decoder = (
            nnx.List(
                [ResBlock(p, width, _STYLE, dropout=dropout, **options) for p in ps]
            )
            for ps in places
        )
        self.norm = group_norm(widths[0], _STYLE.eps, **options)
        zeros = nnx.initializers.zeros
        self.last = Conv(widths[0], shape[-1], kernel_init=zeros, **options)

    def __call__(
        self,
        t: Time,
        x: Float[Array, "batch h w c"],
        cond: Array | None = None,
        *,
        key: DropoutKey | None = None,
    ) -> Float[Array, "batch h w c"]:
        """The prediction at times t, () or (batch,); with a `key`, under dropout."""
        check_shape(self, x, self.shape)
        check_condition(cond, self.cond_dim)
        emb = self.map2(nnx.silu(self.map1(positional(t, self.channels))))
        if self.cond is not None:
            emb = emb + self.cond(cond)
        emb, h, number = nnx.silu(emb), self.first(x), 0
        skips = [h]
        for block in self.encoder:
            h = call(block, h, emb, fold_in(key, number), remat=self.remat)
            skips.append(h)
            number += 1
        for block in self.decoder:
            if block.joins:
                h = jnp.concatenate([h, skips.pop()], axis=-1)
            h = call(block, h, emb, fold_in(key, number), remat=self.remat)
            number += 1
        return self.last(nnx.silu(self.norm(h)))


@dataclasses.dataclass(frozen=True)
class ADMConfig(AbstractRecipe):
    """ADM with the sizes for ImageNet at 64 x 64."""

    channels: int = 192
    """The unit of features."""
    multiples: tuple[int, ...] = (1, 2, 3, 4)
    """Multiples of `channels`, one for each halving of the resolution."""
    blocks: int = 3
    """Residual blocks per resolution."""
    attention: tuple[int, ...] = (32, 16, 8)
    """Heights in pixels at which there is attention."""
    dropout: float = dataclasses.field(default=0.1, kw_only=True)
    """Share of features set to zero while training."""

    def make(self, shape: tuple[int, int, int], **options) -> ADMUNet:
        """The network for images of `shape`."""
        return ADMUNet(
            shape,
            channels=self.channels,
            multiples=self.multiples,
            blocks=self.blocks,
            attention=self.attention,
            **options,
        )
