"""What every guidance shares: a denoiser made from denoisers.

With x_t = alpha x0 + sigma z and Gaussian noise, a term G added to the score moves both
posterior means and leaves x_t where it is:

    x0_hat + S,    z_hat - (alpha / sigma) S,    S = (sigma^2 / alpha) G            (1)

Which distribution is sampled is another matter: see docs/conditional.md.
"""

from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..models.denoiser import AbstractDenoiser
from ..processes.path import LOGSNR_FLOOR, AbstractPath, batched
from ..typing import (
    PyTree,
    Scalar,
    ScalarLike,
    Time,
    condition_arrays,
    float_array,
    is_labels,
    is_traced,
    number,
)

Means: TypeAlias = tuple[Float[Array, "batch ..."], Float[Array, "batch ..."]]


def arrays(tree: PyTree) -> PyTree:
    """The condition of one sample with JAX arrays for leaves."""
    return jax.tree.map(jnp.asarray, condition_arrays(tree))


def marker(tree: PyTree) -> PyTree:
    """The condition of one sample that stands for none, which is not None."""
    if not jax.tree.leaves(tree):
        raise ValueError(
            "null is the condition of one sample that stands for none, built like the "
            "others, such as jnp.zeros(10), or the label 10 for a network of 10 "
            f"classes, got {tree!r}."
        )
    return arrays(tree)


def finite(name: str = "weight", **options) -> Any:
    """A field for finite numbers; `options` are those of `equinox.field`."""

    def convert(x):
        x = float_array(x)
        if not is_traced(x) and not np.isfinite(np.asarray(x)).all():
            raise ValueError(f"the guidance {name} must be finite, got {x}.")
        return x

    return eqx.field(converter=convert, **options)


class AbstractGuidance(AbstractDenoiser):
    """A denoiser around another one, `denoiser`, on its path."""

    denoiser: eqx.AbstractVar[AbstractDenoiser]

    @property
    def path(self) -> AbstractPath:
        """The path of the denoiser inside."""
        return self.denoiser.path

    @property
    def data_scale(self) -> Float[Array, "..."]:
        """That of the denoiser inside."""
        return self.denoiser.data_scale


class Unconditional(AbstractGuidance):
    """A denoiser that ignores its condition and gets `null` instead.

    **Arguments:**
    - `denoiser`: the denoiser inside.
    - `null`: the condition of one sample, without the batch axis, that stands for none;
      None for a network that takes no condition.
    """

    denoiser: AbstractDenoiser
    null: PyTree = eqx.field(default=None, converter=arrays)

    def posterior_means(self, t, x, cond=None):
        """(E[x0 given x_t], E[z given x_t])."""
        return self.denoiser.posterior_means(t, x, spread(self.null, len(x)))


class Interval(eqx.Module):
    """The noise levels sigma / alpha with guidance (Kynkaanniemi et al. 2024).

    **Arguments:**
    - `low`, `high`: the limits, which are included; 0 and infinity.
    """

    low: Scalar = number(0.0)
    high: Scalar = number(float("inf"))

    def __check_init__(self):
        if not is_traced(self) and not 0 <= float(self.low) < float(self.high):
            raise ValueError(
                "an interval of noise levels sigma / alpha needs 0 <= low < high, got "
                f"{float(self.low):g} and {float(self.high):g}."
            )

    def __call__(self, path: AbstractPath, t: Scalar) -> Scalar:
        """1 at the times within, 0 outside."""
        alpha, sigma = path.level(t)
        return ((sigma >= self.low * alpha) & (alpha >= sigma / self.high)) * 1.0

    def weight(self, w: Scalar, path: AbstractPath, t: Time, x: Array) -> Array:
        """w at t, 0 outside the interval, shaped to multiply x."""
        return (w * batched(lambda t: self(path, t), t, x)).astype(x.dtype)


def moved(path: AbstractPath, t: Time, means: Means, shift: Array, x: Array) -> Means:
    """Both means after a shift S of x0_hat, equation (1)."""
    ratio = batched(lambda t: path.alpha(t) / path.sigma(t), t, x)
    shift = shift.astype(x.dtype)
    return means[0] + shift, (means[1] - ratio * shift).astype(x.dtype)


def steered(guidance: Any, t: Time, means: Means, slope: Array, x: Array) -> Means:
    """Both means after `slope` is added to the score, by the weight at t."""
    path = guidance.path
    w = guidance.interval.weight(guidance.weight, path, t, x)
    return moved(path, t, means, w * noise_gain(path, off_noise(path, t), x) * slope, x)


def noise_gain(path: AbstractPath, t: Time, x: Array) -> Float[Array, "..."]:
    """sigma^2 / alpha, shaped to multiply x; alpha not below sigma / 1000."""

    def gain(t):
        alpha, sigma = path.scales(t)
        return sigma**2 / jnp.maximum(alpha, jnp.exp(LOGSNR_FLOOR / 2) * sigma)

    return batched(gain, t, x)


def remaining_variance(alpha: Array, sigma: Array, sigma_data: ScalarLike) -> Array:
    """r_t^2, the variance of x0 given x_t for Gaussian data of this deviation."""
    return (sigma_data * sigma) ** 2 / ((alpha * sigma_data) ** 2 + sigma**2)


def off_noise(path: AbstractPath, t: Time) -> Time:
    """t, or the time of alpha / sigma = 1e-3 where it is below."""
    # At alpha = 0 the gradient in x is 0 and its gain in (1) infinite.
    return jnp.minimum(t, path.time(LOGSNR_FLOOR).astype(t.dtype))


def carried(path: AbstractPath, t: Time, means: Means, x: Array) -> Means:
    """The means at t with the x0_hat of `off_noise`, for the same x."""

    def coefficients(t):
        (a, s), (b, r) = path.scales(t), path.scales(off_noise(path, t))
        return (b - a) / s, r / s

    data, noise = batched(coefficients, t, x)
    return means[0], (data * means[0] + noise * means[1]).astype(x.dtype)


def spread(cond: PyTree, batch: int) -> PyTree:
    """The condition of one sample for a batch."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (batch, *jnp.shape(a))), cond)


def check_alike(cond: PyTree, null: PyTree, batch: int) -> None:
    """Refuse a condition without the structure of the marker and a batch axis."""
    here, there = jax.tree.structure(cond), jax.tree.structure(null)
    if here != there:
        raise ValueError(
            "the condition must be built like the marker for no condition, with the "
            f"structure {there}, got {here}."
        )
    cond = condition_arrays(cond)
    for leaf, blank in zip(jax.tree.leaves(cond), jax.tree.leaves(null), strict=True):
        wanted = (batch, *blank.shape)
        if leaf.shape != wanted:
            raise ValueError(
                "every array of the condition needs the shape of its part of the "
                f"marker with the batch in front, {wanted}, got {leaf.shape}."
            )
        if is_labels(leaf) and not jnp.issubdtype(blank.dtype, jnp.integer):
            raise ValueError(
                "the marker for no condition must be an integer as the labels are, got "
                f"{blank.dtype}: for a network of 10 classes the label 10."
            )


def check_gaussian(path: AbstractPath) -> None:
    """Refuse noise for which (1) does not hold."""
    if not path.noise.gaussian:
        raise ValueError(
            f"a gradient of the score needs Gaussian noise, but {type(path).__name__} "
            f"has noise={type(path.noise).__name__}."
        )


def per_sample(values: Array, batch: int, name: str) -> Array:
    """`values`, refused unless they are one number for each sample."""
    if jnp.shape(values) != (batch,):
        raise ValueError(
            f"{name} must return one number for each sample, of shape ({batch},), got "
            f"{jnp.shape(values)}. Sum over the coordinates of a sample."
        )
    return values
