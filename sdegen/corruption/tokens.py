"""What systems of tokens share: counts, places and moves.

A move puts the token v at the place i. For one move only the conditionals of single
places given x_t matter:

    P(i, v) = w(i, v) / sum of w,    w(i, v) = p(x0_i = v | x_t) [i, v allowed]     (1)

Several moves at once take tokens as if independent: exact only if they are.
"""

import abc
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from ..typing import RandomKey, Scalar
from .corruption import AbstractCorruption, equal_steps

Tokens: TypeAlias = Int[Array, " length"]
Logits: TypeAlias = Float[Array, "length vocabulary"]


class AbstractTokens(AbstractCorruption):
    """Corruption of t l of the l tokens 0 .. vocabulary - 1 of one sequence.

    A prediction is one row of logits per place. Tokens may be floats, as from `fit`.
    """

    vocabulary: eqx.AbstractVar[int]

    @abc.abstractmethod
    def allowed(self, x: Tokens) -> Bool[Array, "length #vocabulary"]:
        """Which tokens a move may put at which places."""

    def moves(self, x: Tokens, logits: Logits) -> Logits:
        """log w of (1)."""
        log_p = log_softmax(logits, self.vocabulary)
        return jnp.where(self.allowed(x), log_p, -jnp.inf)

    def nats(self, x0: Num[Array, " length"], logits: Logits) -> Array:
        """The cross-entropy of every token of x0."""
        log_p = log_softmax(logits, self.vocabulary)
        return -jnp.take_along_axis(log_p, x0.astype(jnp.int32)[:, None], axis=-1)[:, 0]

    def times(self, steps, shape):
        """From 1 to 0 in equal steps, by default one token to a step."""
        most = shape[0]
        if steps is not None and steps > most:
            raise ValueError(f"{most} tokens take at most {most} steps, got {steps}.")
        return equal_steps(steps, most)

    def training_time(self, u, shape):
        """1/l, 2/l, ..., 1, each for its share of u."""
        return jnp.ceil(u * shape[0]) / shape[0]


def count(t: Scalar, length: int) -> Int[Array, ""]:
    """How many of `length` tokens are corrupted at time t, their share."""
    return jnp.round(t * length).astype(jnp.int32)


def places(key: RandomKey, number: Array, length: int) -> Bool[Array, " length"]:
    """`number` of `length` places, every subset with the same probability."""
    return rank(jax.random.uniform(key, (length,))) < number


def rank(score: Float[Array, " length"]) -> Tokens:
    """How many are above each, ties by their order: compiles faster than a sort."""
    other, own = score[None, :], score[:, None]
    first = jnp.tri(len(score), k=-1, dtype=bool)  # [i, j]: j stands before i
    return jnp.sum((other > own) | ((other == own) & first), axis=1)


def log_softmax(logits: Logits, vocabulary: int) -> Logits:
    """Logits as log-probabilities, if they are for this vocabulary."""
    if logits.shape[-1] != vocabulary:
        raise ValueError(
            f"a network for {vocabulary} tokens gives as many logits for each place, "
            f"got an array (length, vocabulary) of shape {logits.shape}."
        )
    return jax.nn.log_softmax(logits)


def move(key: RandomKey, number: Array, x: Tokens, log_w: Logits) -> Tokens:
    """x after `number` moves at different places; one move is drawn from (1).

    Places are drawn by Gumbel's trick with their total weight, then a token for each.
    """
    where_key, what_key = jax.random.split(key)
    weight = jax.nn.logsumexp(log_w, axis=-1)
    allowed = weight > -jnp.inf
    score = weight + jax.random.gumbel(where_key, weight.shape, weight.dtype)
    token = jax.random.categorical(what_key, log_w, axis=-1).astype(x.dtype)
    return jnp.where((rank(score) < number) & allowed, token, x)
