"""A residual multilayer perceptron for vectors and small images."""

import math

from flax import nnx
from jaxtyping import Array, Float

from ..typing import Time
from .features import Embedding


class MLPBlock(nnx.Module):
    """x + W2 silu(W1 norm(x) + E emb): one residual block."""

    def __init__(self, width: int, *, dtype=None, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.emb = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, h, emb):
        """The block at time embedding `emb`."""
        return h + self.down(nnx.silu(self.up(self.norm(h)) + self.emb(emb)))


class MLP(nnx.Module):
    """(t, x, cond) -> an array of the shape of x, for samples of shape `shape`.

    **Arguments:** `shape`, of one sample; `width` and `depth` (residual blocks);
    `cond_dim`, the length of the condition vector, 0 for none; `dtype`, to compute in
    (parameters stay float32).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        width: int = 128,
        depth: int = 3,
        cond_dim: int = 0,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        self.shape = tuple(shape)
        size = math.prod(self.shape)
        self.embedding = Embedding(width, cond_dim=cond_dim, dtype=dtype, rngs=rngs)
        self.first = nnx.Linear(size, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [MLPBlock(width, dtype=dtype, rngs=rngs) for _ in range(depth)]
        )
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.last = nnx.Linear(
            width, size, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, t: Time, x: Float[Array, "batch ..."], cond: Array | None = None
    ) -> Float[Array, "batch ..."]:
        """The prediction at times t, () or (batch,)."""
        check_shape(self, x, self.shape)
        emb = self.embedding(t, cond)
        h = self.first(x.reshape(x.shape[0], -1))
        for block in self.blocks:
            h = block(h, emb)
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
