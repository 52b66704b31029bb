"""A residual multilayer perceptron for vectors and small images."""

import dataclasses
import math

from flax import nnx

from .embeddings import Embedding
from .layers import dropout
from .network import AbstractNetwork, AbstractNetworkConfig


class MLPBlock(nnx.Module):
    """x + W2 silu(W1 norm(x) + E emb)."""

    def __init__(self, width: int, *, dropout=0.0, **options):
        self.dropout = dropout
        self.norm = nnx.LayerNorm(width, **options)
        self.up = nnx.Linear(width, width, **options)
        self.emb = nnx.Linear(width, width, **options)
        self.down = nnx.Linear(width, width, **options)

    def __call__(self, h, emb, key=None):
        """The block at the embedding `emb`."""
        r = nnx.silu(self.up(self.norm(h)) + self.emb(emb))
        return h + self.down(dropout(r, self.dropout, key))


class MLP(AbstractNetwork):
    """A residual multilayer perceptron.

    **Arguments:**
    - `shape`: of one sample.
    - `width`: features of every layer, default 128.
    - `depth`: residual blocks, default 3.
    - `cond_dim`, `dropout`, `remat`, `dtype`, `rngs`: as in `AbstractNetwork`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        width: int = 128,
        depth: int = 3,
        cond_dim: int = 0,
        dropout: float = 0.0,
        remat: bool = False,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        self.shape, self.cond_dim, self.remat = tuple(shape), cond_dim, remat
        size, options = math.prod(self.shape), {"dtype": dtype, "rngs": rngs}
        self.embedding = Embedding(width, cond_dim=cond_dim, **options)
        self.first = nnx.Linear(size, width, **options)
        self.blocks = nnx.List(
            [MLPBlock(width, dropout=dropout, **options) for _ in range(depth)]
        )
        self.norm = nnx.LayerNorm(width, **options)
        zeros = nnx.initializers.zeros
        self.last = nnx.Linear(width, size, kernel_init=zeros, **options)

    def predict(self, x, emb, key):
        """The prediction for x."""
        h, run = self.first(x.reshape(x.shape[0], -1)), self.runner(emb, key)
        for block in self.blocks:
            h = run(block, h)
        return self.last(nnx.silu(self.norm(h))).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class MLPConfig(AbstractNetworkConfig):
    """A residual multilayer perceptron."""

    network = MLP
    width: int = 128  # features of every layer
    depth: int = 3  # residual blocks
