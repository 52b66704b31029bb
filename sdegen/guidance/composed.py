"""Several conditions: all of them, or one or another; some may be avoided.

With s the score without a condition, s_k that under condition c_k:

    product    s + sum_k w_k (s_k - s)                                              (1)
    mixture    sum_k r_k s_k,   r = softmax_k(log w_k + log p_t(x_t | c_k))         (2)

(1) is Liu et al. 2022, "Compositional visual generation with composable diffusion
models", eq. 11: not the score of one process at all noise levels. A negative weight
keeps away from its condition. (2) is the score of the noised mixture: exact.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..models.denoiser import AbstractDenoiser
from ..typing import PyTree, float_array, is_traced
from .classifier_free import stacked
from .guidance import (
    AbstractGuidance,
    Interval,
    check_alike,
    finite,
    marker,
    per_sample,
    spread,
)


class ProductOf(AbstractGuidance):
    """Equation (1) from one call; `cond` is a tuple of a condition for each weight.

    **Arguments:**
    - `denoiser`: trained with and without its condition.
    - `null`: the condition of one sample that stands for none.
    - `weights`: one for each condition, of any sign, (k,).
    - `interval`: the noise levels where it acts; all.
    """

    denoiser: AbstractDenoiser
    null: PyTree = eqx.field(converter=marker)
    weights: Float[Array, " k"] = finite("weights")
    interval: Interval = eqx.field(default_factory=Interval)

    def posterior_means(self, t, x, cond=None):
        """(x0_hat, z_hat) of the product."""
        _check_several(cond, self.weights)
        for one in cond:
            check_alike(one, self.null, len(x))
        conditions = [*cond, spread(self.null, len(x))]
        *under, free = stacked(self.denoiser, t, x, conditions)
        total, t = free, float_array(t)
        for weight, means in zip(self.weights, under, strict=True):
            w = self.interval.weight(weight, self.path, t, x)
            add = lambda s, a, b, w=w: s + w * (a - b)  # noqa: E731
            total = jax.tree.map(add, total, means, free)
        return total


class MixtureOf(AbstractGuidance):
    """Equation (2) from one call; `cond` is a tuple of a condition for each weight.

    **Arguments:**
    - `denoiser`: a conditional one.
    - `log_density`: (t, x, cond) -> log p_t(x | cond) of each sample, (batch,), up to
      what does not depend on cond, or log p(cond | x_t) - log p(cond).
    - `weights`: the share of each condition among the data, positive, (k,).
    """

    denoiser: AbstractDenoiser
    log_density: Callable
    weights: Float[Array, " k"] = finite("weights")

    def posterior_means(self, t, x, cond=None):
        """(x0_hat, z_hat) of the mixture."""
        _check_several(cond, self.weights)
        for one in cond[1:]:
            check_alike(one, jax.tree.map(lambda c: c[0], cond[0]), len(x))
        t, name = float_array(t), "log_density"
        under = stacked(self.denoiser, t, x, list(cond))
        logs = [per_sample(self.log_density(t, x, one), len(x), name) for one in cond]
        shares = jax.nn.softmax(jnp.log(self.weights)[:, None] + jnp.stack(logs), 0)
        shares = shares.reshape(shares.shape + (1,) * (x.ndim - 1))

        def mean(*each):
            return jnp.sum(shares * jnp.stack(each), axis=0).astype(x.dtype)

        return jax.tree.map(mean, *under)

    def __check_init__(self):
        if not is_traced(self.weights) and not (np.asarray(self.weights) > 0).all():
            raise ValueError(
                f"the weights of a mixture must be positive, got {self.weights}. "
                "ProductOf takes negative ones."
            )


def _check_several(cond, weights):
    if not isinstance(cond, tuple | list) or len(cond) != len(weights):
        came = len(cond) if isinstance(cond, tuple | list) else type(cond).__name__
        raise ValueError(
            f"cond must be a tuple of {len(weights)} conditions, one for each weight, "
            f"got {came}."
        )
