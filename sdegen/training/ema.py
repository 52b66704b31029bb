"""Moving averages of the parameters, several at once: by decay or by power function.

    average_n = b_n average_{n-1} + (1 - b_n) theta_n,    n = 1, 2, ...            (1)

Constant decay: b_n = min(decay, n / (9 + n)), so that a young one forgets its start.

Power function (Karras et al. 2024, "Analyzing and improving the training dynamics",
section 3 and appendix C): b_n = (1 - 1/n)^(g + 1) weighs theta_k in proportion to k^g
at every n, so its length grows with training. Its width relative to the time of
training, sigma_rel, is

    sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3))                                     (2)

Averages of two widths, saved now and then, span all others: any average is, to a part
in thousands, a weighted sum of the saved ones, whose weights solve least squares
between the profiles p(t) = (g + 1) t^g / T^(g + 1) on [0, T],

    <p_a, p_b> = (g_a + 1)(g_b + 1) / (g_a + g_b + 1)
                 min(T_a, T_b)^(g_a + g_b + 1) / (T_a^(g_a + 1) T_b^(g_b + 1))      (3)
"""

import abc
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..typing import PyTree, Scalar, ScalarLike, is_traced, number

DECAY = 0.999
"""The decay of the moving average unless another is given."""


class AbstractAverage(eqx.Module):
    """The share 1 - b_n of the new parameters in an average at update n."""

    @abc.abstractmethod
    def share(self, n: ScalarLike) -> Scalar:
        """1 - b_n of equation (1), for n = 1, 2, ..."""


class Decay(AbstractAverage):
    """Constant decay with a warm-up, min(decay, n / (9 + n))."""

    decay: Scalar = number(DECAY)

    def share(self, n):
        """1 - b_n of equation (1)."""
        return jnp.maximum(1 - self.decay, 9 / (9 + n))

    def __check_init__(self):
        if is_traced(self) or bool(0 <= self.decay < 1):
            return
        raise ValueError(f"a moving average needs 0 <= decay < 1, got {self.decay}.")


class Power(AbstractAverage):
    """The power-function average of relative width `std` (sigma_rel), below 0.28."""

    std: Scalar = number(0.10)

    def share(self, n):
        """1 - b_n of equation (1)."""
        # Not 1 - (1 - 1/n)^(g + 1): float32 rounds 1 - 1/n, by percents of 1/n at 1e6.
        return -jnp.expm1((exponent(self.std) + 1) * jnp.log1p(-1 / n))

    def __check_init__(self):
        if is_traced(self) or bool(0 < self.std < 0.28):
            return
        raise ValueError(
            "the relative width of a power-function average lies between 0 and 0.28, "
            f"got std={self.std}. Take 0.05 to 0.15, or Decay for a constant decay."
        )


def exponent(std: ScalarLike) -> Scalar:
    """The exponent g of the power function of relative width `std`, equation (2).

    The largest root of g^3 + 7 g^2 + (16 - 1/std^2) g + 12 - 1/std^2, by Viete's
    trigonometric formula. 16.97 at 0.05, 6.94 at 0.10.
    """
    inverse = 1 / jnp.asarray(std) ** 2
    p = 16 - inverse - 49 / 3  # of the depressed cubic in g + 7/3
    q = 2 * 343 / 27 - 7 * (16 - inverse) / 3 + 12 - inverse
    angle = jnp.arccos(jnp.clip(1.5 * q / p * jnp.sqrt(-3 / p), -1.0, 1.0))
    return 2 * jnp.sqrt(-p / 3) * jnp.cos(angle / 3) - 7 / 3


def as_averages(
    ema: ScalarLike | AbstractAverage | Sequence | None,
) -> tuple[AbstractAverage, ...]:
    """A decay, an average, or several of either, as a tuple; () for None."""
    if ema is None:
        return ()
    several = ema if isinstance(ema, list | tuple) else (ema,)
    return tuple(a if isinstance(a, AbstractAverage) else Decay(a) for a in several)


def update(
    averages: Sequence[AbstractAverage],
    old: Sequence[PyTree],
    new: PyTree,
    n: ScalarLike,
) -> tuple[PyTree, ...]:
    """Equation (1) for every average; floating-point arrays average, others follow."""

    def one(average, tree):
        share = average.share(n)

        def step(a, b):
            inexact = eqx.is_inexact_array(a)
            return a + share.astype(a.dtype) * (b - a) if inexact else b

        return jax.tree.map(step, tree, new)

    return tuple(one(a, tree) for a, tree in zip(averages, old, strict=True))


def posthoc_weights(
    steps: Sequence[int | float],
    stds: Sequence[float],
    target_step: int | float,
    target_std: float,
) -> tuple[Float[np.ndarray, " snapshots"], float]:
    """The sum of saved averages that is nearest to another one, by (3) in float64.

    **Arguments:**
    - `steps`, `stds`: the step at which each average was saved, and its sigma_rel.
    - `target_step`, `target_std`: those of the average that is wanted.

    **Returns:** (weights, error), `error` what is left of the wanted profile, relative
    to its norm.
    """
    ends = np.append(np.asarray(steps, np.float64), target_step)
    # The largest root of the cubic of `exponent`.
    inverse = 1 / np.array([*stds, target_std], np.float64) ** 2
    g = np.array([max(np.roots([1.0, 7.0, 16 - i, 12 - i]).real) for i in inverse])
    total = g[:, None] + g[None, :] + 1
    log_ratio = total * np.log(np.minimum.outer(ends, ends))
    log_own = (g + 1) * np.log(ends)
    ratio = np.exp(log_ratio - log_own[:, None] - log_own[None, :])
    products = np.outer(g + 1, g + 1) / total * ratio
    # Rows and columns are scaled to a unit diagonal: late profiles are small numbers.
    scale = np.sqrt(np.diag(products))
    products = products / np.outer(scale, scale)
    among, wanted = products[:-1, :-1], products[:-1, -1]
    weights = np.linalg.lstsq(among, wanted, rcond=1e-12)[0]
    left = 1 - 2 * weights @ wanted + weights @ among @ weights
    return weights * scale[-1] / scale[:-1], float(np.sqrt(max(left, 0.0)))
