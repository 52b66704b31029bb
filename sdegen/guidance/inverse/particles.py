"""Inverse problems by particles: exact in the limit of many particles and steps."""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from diffrax import RESULTS

from ...sampling.drive import constrain
from ...solvers.solve import Solution, checked
from ...typing import Scalar, number
from ..particles import gaussian_temper, sample_tilted
from .method import AbstractMethod


class TwistedParticles(AbstractMethod):
    """`sample_tilted` with the log-likelihood of the measurement as its reward.

    Samples that share one y are drawn from the same particles. For the evidence log
    p(y) and the weights call `sample_tilted(key, denoiser, measurement.log_prob, ...)`.

    **Arguments:**
    - `particles`: their number for each posterior; 256.
    - `sigma_data`: the standard deviation of the data; 1.
    - `temper`: as in `sample_tilted`; `gaussian_temper`, for about linear operators of
      norm about 1. For others take `share_temper` with a power of 8 or 16.
    - `stochasticity`, `threshold`: as in `sample_tilted`; 1 and 0.5.
    """

    particles: int = eqx.field(default=256, static=True)
    sigma_data: Scalar = number(1.0)
    temper: Callable | None = None
    stochasticity: Scalar = number(1.0)
    threshold: Scalar = number(0.5)

    def draw(self, key, denoiser, measurement, shape, options):
        """Draws from the particles, by their weights."""
        measurement.check_noise("TwistedParticles")
        grid, cond, start, denoise, trajectory, sharding = options
        if start is not None or denoise is not None or trajectory:
            raise ValueError(
                "TwistedParticles starts from noise, denoises and keeps no trajectory: "
                "leave start, denoise and trajectory out."
            )
        temper = self.temper or gaussian_temper(measurement.std, self.sigma_data)
        run, pick = jax.random.split(key)
        own = {"stochasticity": self.stochasticity, "threshold": self.threshold}
        tilted = functools.partial(sample_tilted, grid=grid, temper=temper, **own)
        size = (self.particles, *shape[1:])
        x0 = jax.ShapeDtypeStruct(shape[1:], measurement.y.dtype)
        one = jax.eval_shape(measurement.operator, x0)
        if measurement.y.shape == one.shape and cond is None:
            out = tilted(run, denoiser, measurement.log_prob, size, sharding=sharding)
            x, evaluations = out.draw(pick, shape[0]), out.evaluations
        else:
            y = jnp.broadcast_to(measurement.y, (shape[0], *one.shape))

            def each(i, y, cond):
                own = eqx.tree_at(lambda m: m.y, measurement, y)
                walk, choose = (jax.random.fold_in(k, i) for k in (run, pick))
                out = tilted(walk, denoiser, own.log_prob, size, cond=cond)
                return out.draw(choose, 1)[0], out.evaluations

            # sharding splits the posteriors, not the particles of one
            index, y = (constrain(a, sharding) for a in (jnp.arange(shape[0]), y))
            x, evaluations = jax.vmap(each)(index, y, cond)
            evaluations = evaluations[0]
        return Solution(x, evaluations, checked(RESULTS.successful, x))
