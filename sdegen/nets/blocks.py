"""The residual block of DDPM++, NCSN++ and ADM, and where a UNet puts its blocks."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import nnx

from .conv import Conv
from .layers import attend, dropout, group_norm, resample


@dataclasses.dataclass(frozen=True)
class Place:
    """What one block of a UNet does: features in and out, attention, resolution."""

    inputs: int
    outputs: int
    attention: bool = False
    resample: str = "keep"
    """"down" and "up" change the resolution first."""
    joins: bool = False
    """Whether the block takes a skip connection in (counted in `inputs`)."""


def plan(
    side: int,
    first: int,
    widths: Sequence[int],
    blocks: int,
    attention: Sequence[int],
    *,
    attend_once: bool = False,
) -> tuple[list[Place], list[Place]]:
    """The encoder and the decoder of a UNet, block by block.

    The image has `first` features to begin with, `widths[l]` at resolution side / 2^l,
    with `blocks` blocks there on the way down and one more on the way up; every
    resolution in `attention` has attention, and the lowest one in the middle. The
    output of each block of the encoder, and its input, are the skip connections.

    `attend_once`: only the last block of each resolution of the decoder attends.
    """
    encoder, decoder, skips, now = [], [], [first], first
    for level, width in enumerate(widths):
        attends = side >> level in attention
        if level:
            encoder.append(Place(now, now, resample="down"))
            skips.append(now)
        for _ in range(blocks):
            encoder.append(Place(now, width, attends))
            skips.append(now := width)
    decoder += [Place(now, now, attention=True), Place(now, now)]
    for level in reversed(range(len(widths))):
        if level < len(widths) - 1:
            decoder.append(Place(now, now, resample="up"))
        for i in range(blocks + 1):
            attends = side >> level in attention and (i == blocks or not attend_once)
            inputs, now = now + skips.pop(), widths[level]
            decoder.append(Place(inputs, now, attends, joins=True))
    return encoder, decoder


@dataclasses.dataclass(frozen=True)
class Style:
    """In what the residual blocks of the papers differ."""

    film: bool
    """The embedding scales and shifts between the convolutions, else it shifts."""
    scale: float
    """Of the sum of a residual branch and what it is added to."""
    eps: float
    """Of the group normalisation."""
    fir: bool
    """Resample with [1, 3, 3, 1], else with means and repeats."""
    project: bool
    """A 1 x 1 convolution beside every change of resolution."""
    head: int | None
    """Features of a head of the attention; None for one head."""
    init: Callable
    """The initialiser of the layers that do not begin at zero."""
    init_attention: Callable
    """The initialiser of queries, keys and values."""


class SelfAttention(nnx.Module):
    """Attention among the pixels, without the sum: (batch, h, w, c) to the same."""

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

    **Arguments:** `place`; `width`, of the embedding; `style`; `dropout`; `options`:
    dtype, param_dtype and rngs of every layer.
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
