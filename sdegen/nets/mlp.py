"""A residual multilayer perceptron for vectors and small images."""

import math

from flax import nnx
from jaxtyping import Array, Float

from ..typing import DropoutKey, Time
from .embeddings import Embedding
from .layers import call, dropout, fold_in


class MLPBlock(nnx.Module):
    """x + W2 silu(W1 norm(x) + E emb): one residual block."""

    def __init__(self, width: int, *, dropout=0.0, dtype=None, rngs: nnx.Rngs):
        self.dropout = dropout
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.emb = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, h, emb, key=None):
        """The block at time embedding `emb`."""
        r = nnx.silu(self.up(self.norm(h)) + self.emb(emb))
        return h + self.down(dropout(r, self.dropout, key))


class MLP(nnx.Module):
    """(t, x, cond) -> an array of the shape of x, for samples of shape `shape`.

    **Arguments:** `shape`, of one sample; `width` and `depth` (residual blocks);
    `cond_dim`, the length of the condition vector, 0 for none; `dropout`, the share of
    features that a call with a `key` sets to zero; `remat`, to compute each block again
    for gradients; `dtype`, to compute in (parameters stay float32).
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
        self.shape, self.remat = tuple(shape), remat
        size = math.prod(self.shape)
        self.embedding = Embedding(width, cond_dim=cond_dim, dtype=dtype, rngs=rngs)
        self.first = nnx.Linear(size, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [
                MLPBlock(width, dropout=dropout, dtype=dtype, rngs=rngs)
                for _ in range(depth)
            ]
        )
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.last = nnx.Linear(
            width, size, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs
        )

    def __call__(
        self,
        t: Time,
        x: Float[Array, "batch ..."],
        cond: Array | None = None,
        *,
        key: DropoutKey | None = None,
    ) -> Float[Array, "batch ..."]:
        """The prediction at times t, () or (batch,); with a `key`, under dropout."""
        check_shape(self, x, self.shape)
        emb = self.embedding(t, cond)
        h = self.first(x.reshape(x.shape[0], -1))
        for number, block in enumerate(self.blocks):
            h = call(block, h, emb, fold_in(key, number), remat=self.remat)
        return self.last(nnx.silu(self.norm(h))).reshape(x.shape)


def check_shape(network, x: Array, shape: tuple[int, ...]) -> None:
    """Refuse a batch whose samples do not have `shape`."""
    if x.shape[1:] != shape:
        batch = ("batch", *shape)
        raise ValueError(
            f"this {type(network).__name__} was made for x of shape "
            f"({', '.join(map(str, batch))}), got {x.shape}. Check the shape of the "
            "samples, channels last."
        )
