"""The residual block of DDPM++, NCSN++ and ADM."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import nnx

from .abstract_unet import Place
from .conv import Conv
from .layers import attend, dropout, group_norm, resample


@dataclasses.dataclass(frozen=True)
class Style:
    """How the residual blocks of the papers differ."""

    film: bool
    """The embedding scales and shifts between the convolutions, else it shifts."""
    scale: float
    """Factor of the sum of a residual branch and its input."""
    eps: float
    """Of the group normalisation."""
    fir: bool
    """Resample with [1, 3, 3, 1], else with means and repeats."""
    project: bool
    """A 1 x 1 convolution on the skip of every change of resolution."""
    head: int | None
    """Features of a head of the attention; None for one head."""
    init: Callable
    """The initialiser of the layers that do not begin at zero."""
    init_attention: Callable
    """The initialiser of queries, keys and values."""


class SelfAttention(nnx.Module):
    """Attention among the pixels, without the sum, on (batch, h, w, c)."""

    def __init__(self, features: int, style: Style, **options):
        self.heads = max(1, features // style.head) if style.head else 1
        self.norm = group_norm(features, style.eps, **options)
        init, zeros = style.init_attention, nnx.initializers.zeros
        self.qkv = nnx.Linear(features, 3 * features, kernel_init=init, **options)
        self.out = nnx.Linear(features, features, kernel_init=zeros, **options)

    def __call__(self, h):
        """What attention adds to h."""
        qkv = self.qkv(self.norm(h))
        qkv = qkv.reshape(h.shape[0], -1, 3, self.heads, h.shape[-1] // self.heads)
        return self.out(attend(qkv).reshape(h.shape))


class ResBlock(nnx.Module):
    """Two 3 x 3 convolutions with the embedding between them, then attention.

        r = conv2(drop(silu(norm2(conv1(resample(silu(norm1(h)))); emb))))
        h' = scale (skip(resample(h)) + r),    h'' = scale (h' + attention(h'))

    Song et al. 2021 (DDPM++, NCSN++), Dhariwal and Nichol 2021 (ADM), in the common
    form of Karras et al. 2022, appendix F. The block begins at r = 0, attention = 0.
    `options` are dtype, param_dtype and rngs of every layer.
    """

    def __init__(
        self, place: Place, width: int, style: Style, *, dropout: float, **options
    ):
        inputs, outputs, init = place.inputs, place.outputs, style.init
        self.resample, self.joins, self.dropout = place.resample, place.joins, dropout
        self.film, self.scale, self.fir = style.film, style.scale, style.fir
        self.norm1 = group_norm(inputs, style.eps, **options)
        self.conv1 = Conv(inputs, outputs, kernel_init=init, **options)
        features = outputs * (2 if style.film else 1)
        self.emb = nnx.Linear(width, features, kernel_init=init, **options)
        self.norm2 = group_norm(outputs, style.eps, **options)
        zeros = nnx.initializers.zeros
        self.conv2 = Conv(outputs, outputs, kernel_init=zeros, **options)
        projects = style.project and place.resample != "keep"
        self.skip = nnx.data(
            nnx.Linear(inputs, outputs, kernel_init=init, **options)
            if projects or inputs != outputs
            else None
        )
        self.attention = nnx.data(
            SelfAttention(outputs, style, **options) if place.attention else None
        )

    def __call__(self, h, emb, key=None):
        """The block at embedding `emb`, (width,) or (batch, width)."""
        r = self.conv1(resample(nnx.silu(self.norm1(h)), self.resample, self.fir))
        e = self.emb(emb)[..., None, None, :]
        if self.film:
            scale, shift = jnp.split(e, 2, axis=-1)
            r = self.norm2(r) * (1 + scale) + shift
        else:
            r = self.norm2(r + e)
        r = self.conv2(dropout(nnx.silu(r), self.dropout, key))
        h = resample(h, self.resample, self.fir)
        h = self.scale * ((h if self.skip is None else self.skip(h)) + r)
        return h if self.attention is None else self.scale * (h + self.attention(h))


def res_blocks(places: Sequence[Place], *args, **options) -> nnx.List:
    """A `ResBlock` for each place; the other arguments are those of the blocks."""
    return nnx.List([ResBlock(place, *args, **options) for place in places])
