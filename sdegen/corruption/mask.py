"""Masks: t l of l tokens are hidden, in random places, and uncovered one by one.

    x_t: a uniform subset of t l places hidden,   t = 0, 1/l, ..., 1                (1)
    x_s: one hidden place, chosen uniformly, gets a token from p(x0_i | x_t)        (2)

The mean cross-entropy of a hidden token, over t uniform on 1/l, ..., 1, is an upper
bound of -log p(x0) / l in nats per token (Uria et al. 2014; Hoogeboom et al. 2022).
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from .tokens import AbstractTokens, count, move, places


class Mask(AbstractTokens):
    """Tokens 0 .. vocabulary - 1 of one sequence, and `vocabulary` for a hidden one.

    The absorbing process of Austin et al. 2021, "D3PM", and of Sahoo et al. 2024 and
    Shi et al. 2024 (masked diffusion), by counts. The `start` of a chain may hold
    tokens that are given: uncovered places stay (without `remask`).

    **Arguments:**
    - `vocabulary`: the number of tokens.
    - `remask`: draw all hidden tokens in every step, then hide any t l places anew. It
      may mend a bad token, but is exact only for logits of a joint distribution; no.
    """

    vocabulary: int = eqx.field(static=True)
    remask: bool = eqx.field(default=False, static=True)

    def corrupt(self, key, t, x0):
        """Equation (1)."""
        hidden = places(key, count(t, len(x0)), len(x0))
        return jnp.where(hidden, self.vocabulary, x0.astype(jnp.int32))

    def allowed(self, x):
        """Any token at a hidden place."""
        return (x == self.vocabulary)[:, None]

    def revert(self, key, s, t, x, prediction):
        """Equation (2), until s l places are hidden."""
        x, log_w = x.astype(jnp.int32), self.moves(x, prediction)
        if not self.remask:
            number = jnp.sum(x == self.vocabulary) - count(s, len(x))
            return move(key, number, x, log_w)
        draw_key, hide_key = jax.random.split(key)
        return self.corrupt(hide_key, s, move(draw_key, jnp.array(len(x)), x, log_w))

    def error(self, t, x0, x, prediction):
        """The mean cross-entropy of the hidden tokens, in nats."""
        hidden, nats = x == self.vocabulary, self.nats(x0, prediction)
        return jnp.sum(jnp.where(hidden, nats, 0.0)) / jnp.maximum(hidden.sum(), 1)

    def prior(self, key, shape, dtype=None):
        """All hidden."""
        return jnp.full(shape, self.vocabulary, jnp.int32)
