"""A small bidirectional transformer, from tokens (batch, length) to logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..typing import Time
from .embeddings import Embedding
from .layers import attend
from .network import condition_vectors, init


class Block(nnx.Module):
    """Pre-norm attention and a two-layer perceptron (Xiong et al. 2020)."""

    def __init__(self, width: int, heads: int, **options):
        linear, zeros = functools.partial(nnx.Linear, **options), nnx.initializers.zeros
        self.heads = heads
        self.norm1 = nnx.LayerNorm(width, **options)
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width, kernel_init=zeros)
        self.norm2 = nnx.LayerNorm(width, **options)
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width, kernel_init=zeros)

    def __call__(self, h):
        """The block on (batch, length, width)."""
        qkv = self.qkv(self.norm1(h)).reshape(*h.shape[:2], 3, self.heads, -1)
        h = h + self.out(attend(qkv))
        return h + self.down(nnx.gelu(self.up(self.norm2(h))))


class TokenTransformer(nnx.Module):
    """(t, x, cond) -> logits; positions are learned, every place attends to all.

    **Arguments:**
    - `length`: tokens of a sequence.
    - `vocabulary`: the number of tokens and of logits; the input may hold one more, the
      mask.
    - `width`: features of every token, default 128.
    - `depth`: blocks, default 3.
    - `heads`: of the attention, default 4.
    - `cond_dim`, `dtype`, `rngs`: as in `AbstractNetwork`; dtype is float32 by default.
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
            raise ValueError(f"width {width} must be a multiple of heads, {heads}.")
        self.shape, self.cond_dim = (length,), cond_dim
        options = {"dtype": dtype, "rngs": rngs}
        self.tokens = nnx.Embed(vocabulary + 1, width, **options)
        self.places = nnx.Embed(length, width, **options)
        self.embedding = Embedding(width, cond_dim=cond_dim, **options)
        self.blocks = nnx.List([Block(width, heads, **options) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, **options)
        zeros = nnx.initializers.zeros
        self.last = nnx.Linear(width, vocabulary, kernel_init=zeros, **options)

    def __call__(
        self, t: Time, x: Int[Array, "batch length"], cond: Array | None = None
    ) -> Float[Array, "batch length vocabulary"]:
        """The logits of tokens x at times t, () or (batch,)."""
        emb = self.embedding(t, condition_vectors(self, x, cond))
        h = self.tokens(x) + self.places(jnp.arange(x.shape[1])) + emb[..., None, :]
        for block in self.blocks:
            h = block(h)
        return self.last(self.norm(h))


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A small bidirectional transformer."""

    width: int = 128  # features of every token
    depth: int = 3  # blocks of attention and perceptron
    heads: int = 4  # of the attention

    def __call__(self, length: int, vocabulary: int, key: jax.Array) -> nnx.Module:
        """A new network for sequences of `length` of `vocabulary` tokens."""
        sizes = dataclasses.asdict(self)
        make = functools.partial(TokenTransformer, length, vocabulary, **sizes)
        return init(lambda rngs: make(rngs=rngs), key)
