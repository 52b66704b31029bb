"""Inverse problems by particles: exact in the limit of many particles and steps."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from diffrax import RESULTS

from ...solvers.solve import Solution, checked
from ...typing import Scalar, number
from ..particles import gaussian_temper, sample_tilted
from .method import AbstractMethod


class TwistedParticles(AbstractMethod):
    """`sample_tilted` with the log-likelihood of the measurement as its reward.

    **Arguments:** `particles`, for each posterior: where every sample has a y of its
    own, each has its own particles, and is one of them; where all share one y, the
    samples are drawn from the same ones; `temper`, as in `sample_tilted` (default:
    `gaussian_temper` with `sigma_data`, for operators that are about linear with a norm
    about 1; for others `share_temper` with a power of 8 or 16); `stochasticity` and
    `threshold` as there. For
    the evidence log p(y) and the weights call `sample_tilted(key, denoiser,
    measurement.log_prob, ...)` itself.
    """

    particles: int = eqx.field(default=256, static=True)
    sigma_data: Scalar = number(1.0)
    temper: Callable | None = None
    stochasticity: Scalar = number(1.0)
    threshold: Scalar = number(0.5)

    def __call__(
        self,
        key,
        denoiser,
        measurement,
        shape,
        *,
        grid=None,
        cond=None,
        sharding=None,
    ):
        """Draws from the particles, by their weights."""
        shape = tuple(shape)
        measurement.check(shape)
        measurement.check_noise("TwistedParticles")
        temper = self.temper
        if temper is None:
            temper = gaussian_temper(measurement.std, self.sigma_data)
        run, draw = jax.random.split(key)

        def walk(key, reward, cond, sharding=None):
            return sample_tilted(
                key,
                denoiser,
                reward,
                (self.particles, *shape[1:]),
                grid=grid,
                stochasticity=self.stochasticity,
                temper=temper,
                threshold=self.threshold,
                cond=cond,
                sharding=sharding,
            )

        one = jax.eval_shape(
            measurement.operator, jax.ShapeDtypeStruct(shape[1:], measurement.y.dtype)
        )
        if measurement.y.shape == one.shape and cond is None:
            out = walk(run, measurement.log_prob, None, sharding)
            x, evaluations = out.draw(draw, shape[0]), out.evaluations
        else:
            y = jnp.broadcast_to(measurement.y, (shape[0], *one.shape))

            def each(i, y, cond):
                own = eqx.tree_at(lambda m: m.y, measurement, y)
                keys = (jax.random.fold_in(k, i) for k in (run, draw))
                out = walk(next(keys), own.log_prob, cond)
                return out.draw(next(keys), 1)[0], out.evaluations

            index = jnp.arange(shape[0])
            if sharding is not None:  # of posteriors, not of one's particles
                index, y = jax.lax.with_sharding_constraint((index, y), sharding)
            x, evaluations = jax.vmap(each)(index, y, cond)
            evaluations = evaluations[0]
        return Solution(x, evaluations, checked(RESULTS.successful, x))
