"""DDPM++ and NCSN++: the UNets of score-based modelling (Song et al. 2021).

With the sizes that Karras et al. 2022, table 7, train on CIFAR-10: 55.7 and 56.5
million parameters. DDPM++ is told the time by sines and cosines and resamples by means
and repeats; NCSN++ by Gaussian Fourier features, resamples with the filter [1, 3, 3, 1]
and adds the image itself, halved and convolved, to its encoder at every resolution.

Different on purpose: layers that the paper starts near zero (1e-5) start at zero; the
Fourier frequencies are quantiles of their law (`features.normal_frequencies`) and no
draws; there is no input for augmentation labels, which `cond` can carry.
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..typing import DropoutKey, Time
from .blocks import ResBlock, Style, plan
from .configs import AbstractRecipe
from .conv import Conv
from .embeddings import check_condition, normal_frequencies, positional
from .layers import call, check_sides, down, fold_in, group_norm
from .mlp import check_shape

_INIT = nnx.initializers.glorot_uniform()
_DDPMPP = Style(
    film=False,
    scale=math.sqrt(0.5),
    eps=1e-6,
    fir=False,
    project=True,
    head=None,
    init=_INIT,
    init_attention=nnx.initializers.variance_scaling(0.2, "fan_avg", "uniform"),
)
_NCSNPP = dataclasses.replace(_DDPMPP, fir=True)


class ScoreUNet(nnx.Module):
    """(t, x, cond) -> an array of the shape of x, for images of `shape` (h, w, c).

    **Arguments:** `channels`, the unit of features; `multiples`, of `channels` at each
    halving of the resolution; `blocks`, residual blocks per resolution (one more on the
    way up); `attention`, the heights in pixels with attention; `ncsn`, whether NCSN++
    or else DDPM++; `cond_dim`, the length of the condition vector (one-hot, or of about
    unit length; all zeros is no class), 0 for none; `dropout`, the share of features
    that a call with a `key` sets to zero; `remat`, to compute each block again for
    gradients; `dtype`, to compute in; `param_dtype`, of the parameters.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        channels: int = 128,
        multiples: tuple[int, ...] = (2, 2, 2),
        blocks: int = 4,
        attention: tuple[int, ...] = (16,),
        ncsn: bool = False,
        cond_dim: int = 0,
        dropout: float = 0.0,
        remat: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.shape = tuple(shape)
        check_sides(self, shape, len(multiples) - 1)
        self.cond_dim, self.remat, self.ncsn = cond_dim, remat, ncsn
        self.features = channels * (2 if ncsn else 1)
        whole = {"param_dtype": param_dtype, "rngs": rngs}  # time is not rounded
        options = {"dtype": dtype, **whole}

        def linear(inputs, outputs):
            return nnx.Linear(inputs, outputs, kernel_init=_INIT, **whole)

        width = 4 * channels
        self.cond = nnx.data(linear(cond_dim, self.features) if cond_dim else None)
        self.map1, self.map2 = linear(self.features, width), linear(width, width)
        self.first = Conv(shape[-1], channels, kernel_init=_INIT, **options)
        widths = [channels * multiple for multiple in multiples]
        style = _NCSNPP if ncsn else _DDPMPP
        places = plan(shape[0], channels, widths, blocks, attention, attend_once=True)
        self.encoder, self.decoder = (
            nnx.List(
                [ResBlock(p, width, style, dropout=dropout, **options) for p in ps]
            )
            for ps in places
        )
        # The image at each lower resolution, with the features of the block beside it.
        lower = [p.outputs for p in places[0] if p.resample == "down"] if ncsn else []
        self.image = nnx.List(
            [
                Conv(inputs, outputs, kernel_init=_INIT, **options)
                for inputs, outputs in zip([shape[-1], *lower], lower, strict=False)
            ]
        )
        self.norm = group_norm(widths[0], style.eps, **options)
        zeros = nnx.initializers.zeros
        self.last = Conv(widths[0], shape[-1], kernel_init=zeros, **options)

    def embed(self, t: Time, cond: Array | None) -> Float[Array, "... width"]:
        """Time and condition as one vector per sample."""
        check_condition(cond, self.cond_dim)
        if self.ncsn:
            w = jnp.asarray(normal_frequencies(self.features // 2, 16.0), t.dtype)
            phase = t[..., None] * w
            e = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
        else:
            e = positional(t, self.features, endpoint=True)
        if self.cond is not None:
            e = e + self.cond(cond * math.sqrt(self.cond_dim))
        return nnx.silu(self.map2(nnx.silu(self.map1(e))))

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
        emb, h, image = self.embed(t, cond), self.first(x), x
        skips, number, halving = [h], 0, 0
        for block in self.encoder:
            h = call(block, h, emb, fold_in(key, number), remat=self.remat)
            if self.ncsn and block.resample == "down":
                # Convolve also where the filter reaches beyond the border.
                wide = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
                image = down(self.image[halving](wide), True, padded=True)
                h = image = math.sqrt(0.5) * (h + image)
                halving += 1
            skips.append(h)
            number += 1
        for block in self.decoder:
            if block.joins:
                h = jnp.concatenate([h, skips.pop()], axis=-1)
            h = call(block, h, emb, fold_in(key, number), remat=self.remat)
            number += 1
        return self.last(nnx.silu(self.norm(h)))


@dataclasses.dataclass(frozen=True)
class AbstractScoreRecipe(AbstractRecipe):
    """A ScoreUNet with EDM's sizes for CIFAR-10."""

    ncsn: ClassVar[bool]
    channels: int = 128
    """The unit of features."""
    multiples: tuple[int, ...] = (2, 2, 2)
    """Multiples of `channels`, one for each halving of the resolution."""
    blocks: int = 4
    """Residual blocks per resolution."""
    attention: tuple[int, ...] = (16,)
    """Heights in pixels at which there is attention."""
    dropout: float = dataclasses.field(default=0.13, kw_only=True)
    """Share of features set to zero while training."""

    def make(self, shape: tuple[int, int, int], **options) -> ScoreUNet:
        """The network for images of `shape`."""
        return ScoreUNet(
            shape,
            channels=self.channels,
            multiples=self.multiples,
            blocks=self.blocks,
            attention=self.attention,
            ncsn=self.ncsn,
            **options,
        )


@dataclasses.dataclass(frozen=True)
class DDPMppConfig(AbstractScoreRecipe):
    """DDPM++ for CIFAR-10; the paper's for 64 x 64 has the multiples 1 2 2 2."""

    ncsn: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class NCSNppConfig(AbstractScoreRecipe):
    """NCSN++ for CIFAR-10; the paper's for 64 x 64 has the multiples 1 2 2 2."""

    ncsn: ClassVar[bool] = True
