"""A small bidirectional transformer for tokens (batch, length).

Tokens go in as whole numbers and logits come out, so it is no network of the contract
(t, x, cond) -> an array of the shape of x: it stands in its own module,
`sdegen.nets.transformer`, for the systems of tokens of `sdegen.corruption`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..typing import Time
from .configs import init
from .embeddings import Embedding
from .mlp import check_shape


class Block(nnx.Module):
    """Pre-norm attention and a two-layer perceptron, both residual.

    Vaswani et al. 2017, "Attention is all you need", with the normalisation before each
    (Xiong et al. 2020).
    """

    def __init__(self, width: int, heads: int, *, dtype=None, rngs: nnx.Rngs):
        def linear(inputs, outputs, **kwargs):
            return nnx.Linear(inputs, outputs, dtype=dtype, rngs=rngs, **kwargs)

        zeros = nnx.initializers.zeros
        self.heads = heads
        self.norm1 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width, kernel_init=zeros)
        self.norm2 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width, kernel_init=zeros)

    def __call__(self, h):
        """The block on (batch, length, width)."""
        qkv = self.qkv(self.norm1(h)).reshape(*h.shape[:2], 3, self.heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        h = h + self.out(jax.nn.dot_product_attention(q, k, v).reshape(h.shape))
        return h + self.down(nnx.gelu(self.up(self.norm2(h))))


class TokenTransformer(nnx.Module):
    """(t, x, cond) -> logits, for sequences of `length` tokens 0 .. `vocabulary`.

    **Arguments:** `vocabulary`, the number of tokens, and of logits per place: the
    input may hold one more, `vocabulary`, the mask; `width`, `depth` (blocks), `heads`;
    `cond_dim`, the length of the condition vector, 0 for none; `dtype`, to compute in
    (parameters stay float32). Positions are learned; every place sees every other.
    """

    def __init__(
        self,
        length: int,
        vocabulary: int,
        *,
        width: int = 128,
        depth: int = 3,
        heads: int = 4,
        cond_dim: int = 0,
        dtype=None,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(
                f"width must be a multiple of heads, got {width} and {heads}."
            )
        self.shape = (length,)
        self.tokens = nnx.Embed(vocabulary + 1, width, dtype=dtype, rngs=rngs)
        self.places = nnx.Embed(length, width, dtype=dtype, rngs=rngs)
        self.embedding = Embedding(width, cond_dim=cond_dim, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [Block(width, heads, dtype=dtype, rngs=rngs) for _ in range(depth)]
        )
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.last = nnx.Linear(
            width,
            vocabulary,
            kernel_init=nnx.initializers.zeros,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, t: Time, x: Int[Array, "batch length"], cond: Array | None = None
    ) -> Float[Array, "batch length vocabulary"]:
        """The logits at times t, () or (batch,)."""
        check_shape(self, x, self.shape)
        emb = self.embedding(t, cond)
        h = self.tokens(x) + self.places(jnp.arange(x.shape[1])) + emb[..., None, :]
        for block in self.blocks:
            h = block(h)
        return self.last(self.norm(h))


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A small bidirectional transformer."""

    width: int = 128
    """Features of every token."""
    depth: int = 3
    """Blocks of attention and perceptron."""
    heads: int = 4
    """Heads of the attention."""

    def __call__(
        self, length: int, vocabulary: int, key: jax.Array
    ) -> TokenTransformer:
        """The network for sequences of `length` tokens."""
        sizes = dataclasses.asdict(self)
        return init(
            lambda rngs: TokenTransformer(length, vocabulary, rngs=rngs, **sizes), key
        )
