"""Guidance by a contrast: classifier-free guidance and its relatives.

    strong + w (strong - weak)                                                      (1)

of both posterior means: of the conditional and the unconditional denoiser (Ho and
Salimans 2022, "Classifier-free diffusion guidance", eq. 6, with their w: 0 is the
condition alone; others write 1 + w), or of a model and a worse one (Karras et al. 2024,
"Guiding a diffusion model with a bad version of itself", eq. 4, with weight 1 + w).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..models.denoiser import AbstractDenoiser
from ..typing import PyTree, Scalar, float_array, is_traced
from .guidance import (
    AbstractGuidance,
    Interval,
    Means,
    check_alike,
    finite,
    marker,
    moved,
    spread,
)


class ClassifierFree(AbstractGuidance):
    """Equation (1) from one call of a network, with and without its condition.

    **Arguments:**
    - `denoiser`: trained with and without its condition.
    - `null`: the condition of one sample that stands for none (`LabelDropout`), or one
      to keep away from (a negative prompt).
    - `weight`: w in (1); 1.
    - `interval`: the noise levels where it acts, elsewhere w is 0; all.
    - `rescale`: how far, 0 to 1, the deviation of each denoised sample is brought back
      to the conditional one (Lin et al. 2024, "Common diffusion noise schedules and
      sample steps are flawed", eq. 15 and 16); 0.
    """

    denoiser: AbstractDenoiser
    null: PyTree = eqx.field(converter=marker)
    weight: Scalar = finite(default=1.0)
    interval: Interval = eqx.field(default_factory=Interval)
    rescale: Scalar = finite("rescale", default=0.0)
    # which the labels of a call are for
    network = property(lambda self: getattr(self.denoiser, "network", None))

    def posterior_means(self, t, x, cond=None):
        """(x0_hat, z_hat) of equation (1)."""
        check_alike(cond, self.null, len(x))
        conditions = [cond, spread(self.null, len(x))]
        return contrast(self, t, x, *stacked(self.denoiser, t, x, conditions))


class Autoguided(AbstractGuidance):
    """Equation (1) from a model and a weaker one: smaller, trained less or blind.

    **Arguments:**
    - `denoiser`, `weak`: two on the same path, which see the same condition.
    - `weight`, `interval`, `rescale`: as in `ClassifierFree`.
    """

    denoiser: AbstractDenoiser
    weak: AbstractDenoiser
    weight: Scalar = finite(default=1.0)
    interval: Interval = eqx.field(default_factory=Interval)
    rescale: Scalar = finite("rescale", default=0.0)

    def posterior_means(self, t, x, cond=None):
        """(x0_hat, z_hat) of equation (1)."""
        strong = self.denoiser.posterior_means(t, x, cond)
        return contrast(self, t, x, strong, self.weak.posterior_means(t, x, cond))

    def __check_init__(self):
        paths = (self.denoiser.path, self.weak.path)
        if not is_traced(paths) and not eqx.tree_equal(*paths):
            raise ValueError(
                "both denoisers must be on one path, with the same numbers, got "
                f"{type(paths[0]).__name__} and {type(paths[1]).__name__}."
            )


def contrast(guidance, t, x: Array, strong: Means, weak: Means) -> Means:
    """Equation (1), with interval and rescaling."""
    t, path = float_array(t), guidance.path
    w = guidance.interval.weight(guidance.weight, path, t, x)
    x0, z = jax.tree.map(lambda a, b: (a + w * (a - b)).astype(x.dtype), strong, weak)
    if not is_traced(guidance.rescale) and float(guidance.rescale) == 0:
        return x0, z
    axes = tuple(range(1, x.ndim))
    wanted = jnp.std(strong[0], axis=axes, keepdims=True)
    size = jnp.std(x0, axis=axes, keepdims=True)
    known = size > 0  # one coordinate has no deviation
    factor = jnp.where(known, wanted / jnp.where(known, size, 1.0), 1.0)
    return moved(path, t, (x0, z), guidance.rescale * (factor - 1) * x0, x)


def stacked(denoiser, t, x: Array, conditions: list[PyTree]) -> list[Means]:
    """The posterior means under each condition, in one call of the denoiser."""
    t, count = float_array(t), len(conditions)
    many = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *conditions)
    times = jnp.tile(t, count) if t.ndim else t
    x0, z = denoiser.posterior_means(times, jnp.concatenate([x] * count), many)
    parts = (jnp.split(a, count) for a in (x0, z))
    return list(zip(*parts, strict=True))
