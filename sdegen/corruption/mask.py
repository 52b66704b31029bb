"""Masks: t l of l tokens are hidden, every subset alike, and uncovered one by one.

    x_t: a uniform subset of t l places hidden,   t = 0, 1/l, ..., 1                (1)
    x_s: one hidden place, chosen uniformly, gets a token from p(x0_i | x_t)        (2)

With exact conditionals (2) draws exactly from the data, in a random order. The mean
cross-entropy of a hidden token, over t uniform on 1/l, ..., 1, is an upper bound of
-log p(x0) / l in nats per token (Uria et al. 2014; Hoogeboom et al. 2022).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .corruption import AbstractCorruption
from .tokens import (
    as_tokens,
    count,
    cross_entropy,
    log_softmax,
    move,
    places,
    token_steps,
    whole_share,
)


class Mask(AbstractCorruption):
    """Tokens 0 .. vocabulary - 1 of one sequence, and `vocabulary` for a hidden one.

    The absorbing process of Austin et al. 2021, "D3PM", and of Sahoo et al. 2024 and
    Shi et al. 2024 (masked diffusion), by counts. A prediction is one row of logits per
    place. `steps` < l uncovers several at a time. `noise` draws all hidden tokens and
    then hides t l places afresh, any of them: exact only for logits of a joint law, but
    it may mend a token that was drawn badly.

    `start` may hold tokens that are given: uncovered places stay (without `noise`).
    """

    vocabulary: int = eqx.field(static=True)
    base: bool = eqx.field(default=False, static=True)

    def corrupt(self, key, t, x0):
        """Equation (1)."""
        hidden = places(key, count(t, len(x0)), len(x0))
        return jnp.where(hidden, self.vocabulary, as_tokens(x0))

    def moves(
        self, x: Int[Array, " length"], logits: Float[Array, "length vocabulary"]
    ) -> Float[Array, "length vocabulary"]:
        """The log-weights of all single moves: their softmax is the law of (2)."""
        hidden = (x == self.vocabulary)[:, None]
        return jnp.where(hidden, log_softmax(logits, self.vocabulary), -jnp.inf)

    def revert(self, key, s, t, x, prediction):
        """Equation (2), until s l places are hidden."""
        x, log_w = as_tokens(x), self.moves(x, prediction)
        if not self.base:
            number = jnp.sum(x == self.vocabulary) - count(s, len(x))
            return move(key, number, x, log_w)
        draw_key, hide_key = jax.random.split(key)
        return self.corrupt(hide_key, s, move(draw_key, jnp.array(len(x)), x, log_w))

    def error(self, t, x0, x, prediction):
        """The mean cross-entropy of the hidden tokens, in nats."""
        log_p = log_softmax(prediction, self.vocabulary)
        hidden = x == self.vocabulary
        nats = cross_entropy(log_p, as_tokens(x0))
        return jnp.sum(jnp.where(hidden, nats, 0.0)) / jnp.maximum(hidden.sum(), 1)

    def prior(self, key, shape, dtype=None):
        """All hidden."""
        return jnp.full(shape, self.vocabulary, jnp.int32)

    def times(self, steps, shape):
        """From 1 to 0, one token to a step unless there are fewer `steps`."""
        return token_steps(steps, shape[0])

    def training_time(self, u, shape):
        """1/l, ..., 1, all alike."""
        return whole_share(u, shape[0])
