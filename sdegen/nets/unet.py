"""A small UNet for images (batch, height, width, channels)."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from .conv import Conv
from .embeddings import Embedding
from .layers import attend, call, check_sides, down, dropout, up
from .network import AbstractNetwork, AbstractNetworkConfig


class ResBlock(nnx.Module):
    """Two 3x3 convolutions; the embedding scales and shifts between them (FiLM)."""

    def __init__(
        self, inputs, outputs, width, *, dropout=0.0, dtype=None, rngs: nnx.Rngs
    ):
        def group_norm(features):
            groups = max(g for g in (1, 2, 4, 8) if features % g == 0)
            return nnx.GroupNorm(features, groups, dtype=dtype, rngs=rngs)

        zeros = nnx.initializers.zeros
        self.dropout = dropout
        self.norm1 = group_norm(inputs)
        self.conv1 = Conv(inputs, outputs, dtype=dtype, rngs=rngs)
        self.emb = nnx.Linear(width, 2 * outputs, dtype=dtype, rngs=rngs)
        self.norm2 = group_norm(outputs)
        self.conv2 = Conv(outputs, outputs, kernel_init=zeros, dtype=dtype, rngs=rngs)
        project = inputs != outputs
        self.skip = nnx.data(
            nnx.Linear(inputs, outputs, dtype=dtype, rngs=rngs) if project else None
        )

    def __call__(self, h, emb, key=None):
        """The block at embedding `emb`, (width,) or (batch, width)."""
        r = self.conv1(nnx.silu(self.norm1(h)))
        scale, shift = jnp.split(self.emb(emb)[..., None, None, :], 2, axis=-1)
        r = nnx.silu(self.norm2(r) * (1 + scale) + shift)
        r = self.conv2(dropout(r, self.dropout, key))
        return r + (h if self.skip is None else self.skip(h))


class Attention(nnx.Module):
    """Residual self-attention over the pixels, heads of at most 32 features."""

    def __init__(self, features, *, dtype=None, rngs: nnx.Rngs):
        self.heads = max(1, features // 32)
        self.norm = nnx.LayerNorm(features, dtype=dtype, rngs=rngs)
        self.qkv = nnx.Linear(features, 3 * features, dtype=dtype, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.out = nnx.Linear(
            features, features, kernel_init=zeros, dtype=dtype, rngs=rngs
        )

    def __call__(self, h):
        """The block on (batch, height, width, features)."""
        batch, height, width, features = h.shape
        qkv = self.qkv(self.norm(h)).reshape(batch, height * width, 3, self.heads, -1)
        return h + self.out(attend(qkv).reshape(h.shape))


class UNet(AbstractNetwork):
    """A small UNet for images, with attention at the lowest resolution.

    **Arguments:**
    - `shape`: of one image, (height, width, channels).
    - `channels`: features at full resolution, default 32.
    - `multiples`: of `channels` at each halving of the resolution, default (1, 2).
    - `blocks`: residual blocks per resolution, default 2; one more on the way up.
    - `cond_dim`, `dropout`, `remat`, `dtype`, `rngs`: see `MLP`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
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
        check_sides(self, shape, halvings)
        self.cond_dim, self.remat = cond_dim, remat
        width = 4 * channels

        def res(inputs, outputs):
            return ResBlock(
                inputs, outputs, width, dropout=dropout, dtype=dtype, rngs=rngs
            )

        def conv(inputs, outputs, **kwargs):
            return Conv(inputs, outputs, dtype=dtype, rngs=rngs, **kwargs)

        self.embedding = Embedding(width, cond_dim=cond_dim, dtype=dtype, rngs=rngs)
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
        self.attention = Attention(features, dtype=dtype, rngs=rngs)
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
        self.norm = nnx.LayerNorm(features, dtype=dtype, rngs=rngs)
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
        h = call(self.attention, run(self.middle1, h), remat=self.remat)
        h = run(self.middle2, h)
        for level in range(self.levels):
            for i in range(self.blocks + 1):
                block = self.up[level * (self.blocks + 1) + i]
                h = run(block, jnp.concatenate([h, skips.pop()], axis=-1))
            if level < self.levels - 1:
                h = self.double[level](up(h))
        return self.last(nnx.silu(self.norm(h)))


@dataclasses.dataclass(frozen=True)
class UNetConfig(AbstractNetworkConfig):
    """A small UNet for images."""

    network = UNet  # pyright: ignore[reportAssignmentType]
    channels: int = 32
    """Features at full resolution."""
    multiples: tuple[int, ...] = (1, 2)
    """Multiples of `channels`, one for each halving of the resolution."""
    blocks: int = 1
    """Residual blocks per resolution."""
