"""The score of the law of x_t of any SDE, by a network, and data from it.

    s(t, x) = -(x - m) / S^2 + F(log((t - t_min) / T) / 4, (x - m) / S) / sigma     (1)

with F the network, and m, S^2 the mean and the variance of x_t, sigma^2 the mean
variance of x_t given x_0, per coordinate and measured once by simulation. So inputs and
outputs of F are of unit size, and 0 is the score of independent Gaussians of the right
size. On a linear SDE (1) is, but for a factor, the scaling of Karras et al. 2022.

A drift that confines, such as -x^3, explodes when time runs backwards, unless the score
is right. So F, and the coefficients of the reversed equation, are evaluated at the
nearest state within the range of the simulation at that time; the first term of (1) is
not, and pulls back.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..losses.score_matching import simulated_score_loss
from ..losses.simulated_paths import best_weights, chain, square_clock
from ..processes.noise import AbstractNoise
from ..processes.reverse import clock_of_time, time_of_clock
from ..processes.sde import AbstractSDE
from ..typing import (
    PyTree,
    Scalar,
    ScalarLike,
    Seed,
    Time,
    float_array,
    is_traced,
    random_key,
)
from .generator import AbstractGenerator, backward_of
from .model import Points, call_network, floating_batch, of_one

_PILOT = 1024  # data points that are simulated, twice each, to measure the scales
_LARGEST = 32  # coordinates for which M and its derivative are formed
_APART = 0.2  # by which the law at t_max may miss `prior`, in standard deviations


class SimulatedPrior(AbstractNoise):
    """The law of x at t_max, exactly: a point of the data carried there by the SDE.

    For processes whose law at t_max depends on the data or has no formula.

    **Arguments:**
    - `sde`: the process.
    - `points`: the data, (n, ...).
    - `steps`: as in `ScoreModel.from_data`; 100.
    """

    sde: AbstractSDE
    points: Float[Array, "n ..."] = eqx.field(converter=float_array)
    steps: int = eqx.field(default=100, static=True)
    gaussian = False

    def sample(self, key, shape, dtype=None):
        """One draw of shape `shape`, which is that of the data."""
        if shape != self.points.shape[1:]:
            own = self.points.shape[1:]
            raise ValueError(f"this law is for samples of shape {own}, got {shape}.")
        pick, path = jax.random.split(key)
        i = jax.random.randint(pick, (1,), 0, len(self.points))
        ts = square_clock(self.sde, self.steps, dtype)
        return chain(self.sde, path[None], self.points[i].astype(ts.dtype), ts)[-1, 0]

    def log_prob(self, z):
        """None: the density is not known."""
        return None


class ScoreModel(AbstractGenerator):
    """A network as the score of an SDE, equation (1); made by `from_data`."""

    network: Any
    sde: AbstractSDE
    prior: AbstractNoise
    mean: Float[Array, "times ..."]
    std: Float[Array, "times ..."]
    noise: Float[Array, "times ..."]
    low: Float[Array, "times ..."]
    high: Float[Array, "times ..."]
    weights: Float[Array, "steps ..."] | None

    loss = simulated_score_loss  # pyright: ignore[reportAssignmentType]

    @classmethod
    def from_data(
        cls,
        network: Callable,
        sde: AbstractSDE,
        data: Float[Array, "n ..."],
        key: Seed,
        *,
        steps: int = 100,
        prior: AbstractNoise | None = None,
        pathwise: bool = True,
    ) -> "ScoreModel":
        """The model with its scales measured on paths from `data`.

        **Arguments:**
        - `network`: a callable pytree (time, x, cond) on batches.
        - `sde`: the process.
        - `data`: (n, ...).
        - `key`: a random key.
        - `steps`: of Euler-Maruyama in training, equal in sqrt(t); 100.
        - `prior`: the law of x at t_max, such as a `SimulatedPrior`; `sde.noise`.
        - `pathwise`: train on the targets (4) of `losses.simulated_paths`, of small
          variance, with d^2 numbers per step, and not on the local ones, (2); True.

        **Raises:** a ValueError if the simulated law at t_max is not `prior`.
        """
        data = floating_batch(data, "ScoreModel")
        if steps < 2:
            raise ValueError(f"ScoreModel needs at least two steps, got {steps}.")
        if pathwise and data[0].size > _LARGEST:
            raise ValueError(
                f"pathwise targets are for at most {_LARGEST} coordinates, got "
                f"{data[0].size}. Use pathwise=False."
            )
        if not is_traced(sde) and not jnp.all(sde.diffusion(sde.t_min, data[0])):
            raise ValueError(
                "a score needs noise in every coordinate, but this diffusion is 0 at "
                "t_min and the first row of the data."
            )
        prior, key = sde.noise if prior is None else prior, random_key(key)
        *scales, weights, ends, drawn = _measure(sde, prior, data, key, steps, pathwise)
        if not is_traced(drawn):
            _check_prior(prior, ends, drawn)
        return cls(network, sde, prior, *scales, weights)

    @property
    def clock(self) -> Float[Array, " times"]:
        """The times of the training paths and of the tables."""
        return square_clock(self.sde, len(self.mean) - 1)

    def scales(self, t: ScalarLike):
        """(time of the network, m, S, sigma, both ends of the range) at a scalar t."""
        # Linear in sqrt(t - t_min); before the first step all is as after it.
        n = len(self.mean) - 1
        part = (float_array(t) - self.sde.t_min) / (self.sde.t_max - self.sde.t_min)
        place = n * jnp.sqrt(jnp.maximum(part, 1 / n**2))
        i = jnp.clip(place.astype(int), 1, n - 1)
        share = jnp.clip(place - i, 0.0, 1.0)
        tables = (self.mean, self.std, self.noise, self.low, self.high)
        found = ((1 - share) * a[i] + share * a[i + 1] for a in tables)
        return jnp.log(place / n) / 2, *found

    def score(self, t: Time, x: Points, cond: PyTree = None) -> Points:
        """The score (1) at times t, () or (batch,)."""
        t = jnp.broadcast_to(float_array(t), x.shape[:1])
        time, *scales = jax.vmap(self.scales)(t)
        mean, std, noise, low, high = (a.astype(x.dtype) for a in scales)
        seen = (jnp.clip(x, low, high) - mean) / std
        out = call_network(self.network, time, seen, cond)
        return out / noise - (x - mean) / std**2

    def sample_score(self, t: ScalarLike, x: Array, cond: PyTree = None) -> Array:
        """The score for one sample, as `reverse` and `probability_flow` take it."""
        return of_one(self.score, t, x, cond)

    def start(self, key, shape, dtype=None):
        """A draw of `prior`."""
        return self.prior.sample(key, shape, dtype)

    def backward(self, stochasticity, cond=None):
        """The reverse SDE, or for None the probability flow."""
        score = eqx.Partial(self.sample_score, cond=cond)
        sde = _Within(self, self.sde.t_min, self.sde.t_max, self.prior)
        return backward_of(sde, score, stochasticity)

    def time(self, s):
        """The time of the process at clock s."""
        return time_of_clock(self.sde, s)

    def clock_of(self, t):
        """The clock at time t."""
        return clock_of_time(self.sde, t)


class _Within(AbstractSDE):
    """The model's SDE, beyond the range of its paths as at the end of the range."""

    model: ScoreModel
    t_min: Scalar
    t_max: Scalar
    noise: AbstractNoise

    def drift(self, t, x):
        return self.model.sde.drift(t, self._nearest(t, x))

    def diffusion(self, t, x):
        return self.model.sde.diffusion(t, self._nearest(t, x))

    def _nearest(self, t, x):
        low, high = self.model.scales(t)[-2:]
        return jnp.clip(x, low.astype(x.dtype), high.astype(x.dtype))


@eqx.filter_jit
def _measure(sde, prior, data, key, steps, pathwise):
    """The tables of (1), the weights of the targets, and two clouds at t_max."""
    pick, path, last = jax.random.split(key, 3)
    ts = square_clock(sde, steps, data.dtype)
    x0 = data[jax.random.randint(pick, (_PILOT,), 0, len(data))]
    twice = jnp.concatenate([x0, x0])
    both = chain(sde, jax.random.split(path, 2 * _PILOT), twice, ts)
    gap = both[:, :_PILOT] - both[:, _PILOT:]
    noise = jnp.sqrt(jnp.mean(gap**2, axis=1) / 2)
    weights = best_weights(sde, ts, both) if pathwise else None
    keys = jax.random.split(last, _PILOT)
    drawn = jax.vmap(lambda k: prior.sample(k, x0.shape[1:], x0.dtype))(keys)
    tables = both.mean(1), both.std(1), noise, both.min(1), both.max(1)
    return *tables, weights, both[-1], drawn


def _check_prior(prior, ends, drawn):
    if not bool(jnp.isfinite(ends).all()):
        raise ValueError(
            "the simulated paths are not finite at t_max: the steps are too large for "
            "this drift. Take more steps (steps=...), or scale x or t."
        )
    mean, std = ends.mean(0), ends.std(0)
    gap = jnp.abs(mean - drawn.mean(0)) / drawn.std(0)
    ratio = jnp.abs(jnp.log(std / drawn.std(0)))
    if bool((gap > _APART).any() | (ratio > _APART).any()):
        i = int(jnp.argmax(gap + ratio))
        found = (a.ravel()[i] for a in (mean, std, drawn.mean(0), drawn.std(0)))
        mean, std, mean_of_prior, std_of_prior = map(float, found)
        raise ValueError(
            f"at t_max the paths have mean {mean:.3g} and standard deviation {std:.3g} "
            f"in coordinate {i}, but {type(prior).__name__} has {mean_of_prior:.3g} "
            f"and {std_of_prior:.3g}. Take a larger t_max, or "
            "prior=sdegen.SimulatedPrior(sde, data)."
        )
