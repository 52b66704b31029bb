"""Edits: t l of l tokens are replaced by different ones, and put right one by one.

    x_t: a uniform subset of t l places, each with one of the V - 1 other tokens    (1)
    x_s: x0_hat from p(x0 | x_t), which differs at t l places; one of them reverts  (2)

(2) is one move, of probability P(i, v) = p(x0_i = v | x_t) / (t l) for v other than
x_i. The chain is exact from the true distribution of x_1, which is not uniform.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .corruption import corrupted_example, data_field
from .tokens import AbstractTokens, count, move, places


class Edit(AbstractTokens):
    """The uniform process of Austin et al. 2021, "D3PM", by counts (also Su 2022).

    **Arguments:**
    - `vocabulary`: the number of tokens.
    - `examples`: data, (n, length), from whose true distribution at t = 1 the chain
      starts. Without them it starts from uniform tokens, which is not exact; none.
    """

    vocabulary: int = eqx.field(static=True)
    examples: Array | None = data_field()

    def __check_init__(self):
        if self.vocabulary < 2:
            raise ValueError(f"vocabulary must be at least 2, got {self.vocabulary}.")

    def corrupt(self, key, t, x0):
        """Equation (1)."""
        where_key, what_key = jax.random.split(key)
        changed = places(where_key, count(t, len(x0)), len(x0))
        shift = jax.random.randint(what_key, x0.shape, 1, self.vocabulary, jnp.int32)
        return (x0.astype(jnp.int32) + jnp.where(changed, shift, 0)) % self.vocabulary

    def allowed(self, x):
        """Any other token, everywhere."""
        return x[:, None] != jnp.arange(self.vocabulary)

    def revert(self, key, s, t, x, prediction):
        """Equation (2), (t - s) l times at once."""
        x = x.astype(jnp.int32)
        number = count(t, len(x)) - count(s, len(x))
        return move(key, number, x, self.moves(x, prediction))

    def error(self, t, x0, x, prediction):
        """The mean cross-entropy of all tokens, in nats."""
        return jnp.mean(self.nats(x0, prediction))

    def prior(self, key, shape, dtype=None):
        """An example with every token replaced; without examples, uniform tokens."""
        if self.examples is None:
            return jax.random.randint(key, shape, 0, self.vocabulary, jnp.int32)
        return corrupted_example(key, self, self.examples, shape, dtype)
