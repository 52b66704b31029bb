"""The residual block of UNets: DDPM++, NCSN++, ADM and the small one."""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from .abstract_unet import Place
from .conv import Conv
from .layers import attend, dropout, group_norm, resample


@dataclasses.dataclass(frozen=True)
class Style:
    """How the residual blocks of the papers differ."""

    eps: float  # of the normalisation
    init: Callable  # of the layers that do not begin at zero
    init_attention: Callable  # of queries, keys and values
    film: bool = False  # the embedding scales and shifts, else it shifts
    scale: float = 1.0  # of the sum of a residual branch and its input
    fir: bool = False  # resample with [1, 3, 3, 1], else with means and repeats
    project: bool = False  # a map on the skip of every change of resolution
    head: int | None = None  # features of a head of the attention; None for one head
    norm: Callable = group_norm  # (features, epsilon=eps) -> a layer


class SelfAttention(nnx.Module):
    """Attention among the pixels, without the sum, on (batch, ..., c)."""

    def __init__(self, features: int, style: Style, **options):
        self.heads = max(1, features // style.head) if style.head else 1
        self.norm = style.norm(features, epsilon=style.eps, **options)
        init, zeros = style.init_attention, nnx.initializers.zeros
        self.qkv = nnx.Linear(features, 3 * features, kernel_init=init, **options)
        self.out = nnx.Linear(features, features, kernel_init=zeros, **options)

    def __call__(self, h):
        """What attention adds to h."""
        qkv = self.qkv(self.norm(h))
        qkv = qkv.reshape(h.shape[0], -1, 3, self.heads, h.shape[-1] // self.heads)
        return self.out(attend(qkv).reshape(h.shape))


class ResBlock(nnx.Module):
    """Two convolutions, 3 x 3, with the embedding between them, then attention.

        r = conv2(drop(silu(norm2(conv1(resample(silu(norm1(h)))); emb))))
        h' = scale (skip(resample(h)) + r),    h'' = scale (h' + attention(h'))

    Song et al. 2021 (DDPM++, NCSN++), Dhariwal and Nichol 2021 (ADM), in the common
    form of Karras et al. 2022, appendix F. The block begins at r = 0, attention = 0.
    """

    def __init__(
        self, place: Place, width: int, style: Style, *, dropout, axes=2, **options
    ):
        inputs, outputs = place.inputs, place.outputs
        self.resample, self.joins, self.dropout = place.resample, place.joins, dropout
        self.film, self.scale, self.fir = style.film, style.scale, style.fir
        linear = functools.partial(nnx.Linear, kernel_init=style.init, **options)
        self.norm1 = style.norm(inputs, epsilon=style.eps, **options)
        self.conv1 = Conv(inputs, outputs, axes=axes, kernel_init=style.init, **options)
        features = outputs * (2 if style.film else 1)
        self.emb = linear(width, features)
        self.norm2 = style.norm(outputs, epsilon=style.eps, **options)
        zeros = nnx.initializers.zeros
        self.conv2 = Conv(outputs, outputs, axes=axes, kernel_init=zeros, **options)
        project = style.project and place.resample != "keep"
        self.skip = linear(inputs, outputs) if project or inputs != outputs else None
        attends = place.attention
        self.attention = SelfAttention(outputs, style, **options) if attends else None

    def __call__(self, h, emb, key=None):
        """The block at embedding `emb`, (width,) or (batch, width)."""
        r = self.conv1(resample(nnx.silu(self.norm1(h)), self.resample, self.fir))
        e = self.emb(emb)
        e = jnp.expand_dims(e, tuple(range(-h.ndim + 1, -1)))
        if self.film:
            scale, shift = jnp.split(e, 2, axis=-1)
            r = self.norm2(r) * (1 + scale) + shift
        else:
            r = self.norm2(r + e)
        r = self.conv2(dropout(nnx.silu(r), self.dropout, key))
        h = resample(h, self.resample, self.fir)
        h = self.scale * ((h if self.skip is None else self.skip(h)) + r)
        return h if self.attention is None else self.scale * (h + self.attention(h))
