"""A small UNet for series, images and volumes, channels last."""

import dataclasses
import functools

import jax.numpy as jnp
from flax import nnx

from .abstract_unet import Place
from .blocks import ResBlock, SelfAttention, Style
from .conv import Conv
from .embeddings import Embedding
from .layers import call, check_halvings, down, up
from .network import AbstractNetwork, AbstractNetworkConfig


def _group_norm(features: int, **options) -> nnx.GroupNorm:
    groups = max(g for g in (1, 2, 4, 8) if features % g == 0)
    return nnx.GroupNorm(features, groups, **options)


_INIT = nnx.initializers.lecun_normal()
_STYLE = Style(1e-6, _INIT, _INIT, film=True, head=32, norm=_group_norm)
_ATTENTION = dataclasses.replace(_STYLE, norm=nnx.LayerNorm)


class UNet(AbstractNetwork):
    """A small UNet, with attention at the lowest resolution.

    **Arguments:**
    - `shape`: of one sample, (length, channels), (height, width, channels) or (depth,
      height, width, channels): it has as many spatial axes.
    - `channels`: features at full resolution, default 32.
    - `multiples`: of `channels` at each halving of the resolution, default (1, 2).
    - `blocks`: residual blocks per resolution, default 2; one more on the way up.
    - `cond_dim`, `dropout`, `remat`, `dtype`, `rngs`: as in `AbstractNetwork`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        channels: int = 32,
        multiples: tuple[int, ...] = (1, 2),
        blocks: int = 2,
        cond_dim: int = 0,
        dropout: float = 0.0,
        remat: bool = False,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        self.shape, halvings = tuple(shape), len(multiples) - 1
        check_halvings(self, shape, halvings, axes=(1, 2, 3))
        self.cond_dim, self.remat = cond_dim, remat
        width, options = 4 * channels, {"dtype": dtype, "rngs": rngs}
        axes = len(shape) - 1
        conv = functools.partial(Conv, axes=axes, **options)

        def res(inputs, outputs):
            place = Place(inputs, outputs)
            return ResBlock(place, width, _STYLE, dropout=dropout, axes=axes, **options)

        self.embedding = Embedding(width, cond_dim=cond_dim, **options)
        self.first = conv(shape[-1], channels)
        down, skips, features = [], [channels], channels
        for level, multiple in enumerate(multiples):
            for _ in range(blocks):
                down.append(res(features, channels * multiple))
                features = channels * multiple
                skips.append(features)
            if level < halvings:
                skips.append(features)
        self.down = nnx.List(down)
        self.middle1, self.middle2 = res(features, features), res(features, features)
        self.attention = SelfAttention(features, _ATTENTION, **options)
        up, double = [], []
        for level, multiple in reversed(list(enumerate(multiples))):
            for _ in range(blocks + 1):
                up.append(res(features + skips.pop(), channels * multiple))
                features = channels * multiple
            if level:  # narrow at the low resolution, where it is cheap
                double.append(conv(features, channels * multiples[level - 1]))
                features = channels * multiples[level - 1]
        self.up, self.double = nnx.List(up), nnx.List(double)
        self.levels, self.blocks = len(multiples), blocks
        self.norm = nnx.LayerNorm(features, **options)
        self.last = conv(features, shape[-1], kernel_init=nnx.initializers.zeros)

    def predict(self, x, emb, key):
        """The prediction for x."""
        run, h = self.runner(emb, key), self.first(x)
        skips = [h]
        for level in range(self.levels):
            for i in range(self.blocks):
                h = run(self.down[level * self.blocks + i], h)
                skips.append(h)
            if level < self.levels - 1:
                h = down(h)
                skips.append(h)
        h = run(self.middle1, h)
        h = run(self.middle2, h + call(self.attention, h, remat=self.remat))
        for level in range(self.levels):
            for i in range(self.blocks + 1):
                block = self.up[level * (self.blocks + 1) + i]
                h = run(block, jnp.concatenate([h, skips.pop()], axis=-1))
            if level < self.levels - 1:
                h = self.double[level](up(h))
        return self.last(nnx.silu(self.norm(h)))


@dataclasses.dataclass(frozen=True)
class UNetConfig(AbstractNetworkConfig):
    """A small UNet for series, images and volumes."""

    network = UNet
    channels: int = 32  # features at full resolution
    multiples: tuple[int, ...] = (1, 2)  # of `channels`, one for each halving
    blocks: int = 1  # residual blocks per resolution
