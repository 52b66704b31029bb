"""Networks that learn the velocity of a track, and the equations they then drive.

    x_t = I(t, x0, x1) + gamma z,    b = E[dI/dt + gamma' z | x_t]                 (1)
    L = 1/2 sum_+- |b(x_+-) - dI/dt|^2 - gamma' (b(x_+) - b(x_-)) . z              (2)
      + 1/2 sum_+- |z_hat(x_+-) -+ z|^2,    x_+- = I +- gamma z

(2) is the regression on (1) with z and -z in a pair, less the term |gamma' z|^2 that no
network can change: where gamma' is infinite, b(x_+) - b(x_-) vanishes with gamma, and
the loss keeps a finite variance (Albergo, Boffi and Vanden-Eijnden 2023, "Stochastic
interpolants", section 6.1). Without latent noise it is conditional flow matching.

From z_hat follows the score, -z_hat / gamma, and with it a process of any noise level
eps(t) >= 0 with the same marginals (theorem 8 there), on the clock s from 0 at t_max to
1 at t_min, T = t_max - t_min:

    dx = T (-b + eps score) ds + sqrt(2 eps T) dw,    eps = lambda^2 gamma^2 / T
       = (-T b - lambda^2 gamma z_hat) ds + sqrt(2) lambda gamma dw                (3)

lambda, the stochasticity, is chosen after training; eps vanishes at the ends, where the
score of the model is 0 / 0.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import AbstractBase, Gaussian
from .coupling import independent
from .denoiser import batched
from .generator import AbstractGenerator
from .sde import AbstractSDE
from .times import Uniform
from .track import AbstractTrack
from .typing import AxisName, PyTree, RandomKey, Scalar, Time, float_array, number


class VelocityModel(AbstractGenerator):
    """A network with the track whose velocity it predicts; `fit` and `sample` take it.

    **Arguments:** `network`, a callable pytree (time, x, cond) -> b on batches, or a
    pair of them, for b and for E[z | x_t], which stochastic sampling needs; `track`.
    """

    network: Any
    track: AbstractTrack

    def velocity(
        self, t: Time, x: Float[Array, "batch ..."], cond: PyTree = None
    ) -> Float[Array, "batch ..."]:
        """b(t, x) on a batch, t of shape () or (batch,)."""
        pair = isinstance(self.network, tuple)
        return _call(self.network[0] if pair else self.network, t, x, cond)

    def latent(
        self, t: Time, x: Float[Array, "batch ..."], cond: PyTree = None
    ) -> Float[Array, "batch ..."]:
        """E[z given x_t] on a batch."""
        if not isinstance(self.network, tuple):
            raise ValueError(
                "the noise of this model is unknown: give VelocityModel a pair of "
                "networks, for the velocity and for the latent noise, or sample with "
                "stochasticity=0."
            )
        return _call(self.network[1], t, x, cond)

    def score(
        self, t: Time, x: Float[Array, "batch ..."], cond: PyTree = None
    ) -> Float[Array, "batch ..."]:
        """The gradient of log p_t at x, between the ends."""
        gamma = batched(self.track.gamma, float_array(t), x)
        return -self.latent(t, x, cond) / gamma

    def start(self, key, shape, dtype=None):
        """x at t_max, with x0 = 0."""
        track, (end_key, latent_key) = self.track, jax.random.split(key)
        x1 = track.base.sample(end_key, shape, dtype)
        z = jax.random.normal(latent_key, shape, x1.dtype)
        x = track.point(track.t_max, jnp.zeros_like(x1), x1, z)
        return x.astype(x1.dtype)

    def backward(self, stochasticity, cond=None):
        """The flow, for None, or equation (3)."""
        if stochasticity is None:
            return _Flow(self, cond)
        return _Backward(self, cond, stochasticity)

    def data(self, state):
        """The state."""
        return state

    def __check_init__(self):
        if isinstance(self.network, tuple) and len(self.network) != 2:
            raise ValueError(
                "network is one network for the velocity, or a pair for the velocity "
                f"and the latent noise, got {len(self.network)} of them."
            )
        if isinstance(self.network, tuple):
            if self.track.gamma(self.track.t_max) is None:
                raise ValueError(
                    f"this {type(self.track).__name__} has no latent noise: a second "
                    "network has nothing to learn, give it the first alone."
                )


def _call(network, t, x, cond):
    out = network(jnp.broadcast_to(float_array(t), x.shape[:1]), x, cond)
    if getattr(out, "shape", None) != x.shape:
        raise ValueError(
            f"the network must return an array of the shape of x, {x.shape}, got "
            f"{getattr(out, 'shape', type(out).__name__)}. Check its output."
        )
    return out.astype(x.dtype)


class _Flow(eqx.Module):
    """(3) with lambda = 0, for one sample."""

    model: VelocityModel
    cond: PyTree

    def time(self, s):
        """(t, T) at clock s."""
        low, high = self.model.track.t_min, self.model.track.t_max
        return high - (high - low) * s, high - low

    def one(self, method, t, x):
        """A method of the model for one sample."""
        return method(t, x[None], jax.tree.map(lambda c: c[None], self.cond))[0]

    def __call__(self, s, x):
        t, span = self.time(s)
        return -span * self.one(self.model.velocity, t, x)


class _Backward(AbstractSDE):
    """Equation (3), for one sample."""

    model: VelocityModel
    cond: PyTree
    stochasticity: Scalar
    t_min: Scalar = number(0.0)
    t_max: Scalar = number(1.0)
    base: AbstractBase = eqx.field(default_factory=Gaussian)

    def drift(self, t, x):
        """The drift of (3) at clock t."""
        flow = _Flow(self.model, self.cond)
        time = flow.time(t)[0]
        pull = self.model.track.gamma(time) * flow.one(self.model.latent, time, x)
        return flow(t, x) - self.stochasticity**2 * pull

    def diffusion(self, t, x):
        """The noise of (3) at clock t."""
        gamma = self.model.track.gamma(_Flow(self.model, self.cond).time(t)[0])
        return jnp.sqrt(2.0) * self.stochasticity * gamma


def velocity_loss(
    model: VelocityModel,
    key: RandomKey,
    x0: Float[Array, "batch ..."],
    cond: PyTree = None,
    *,
    coupling: Any = independent,
    times: Any = None,
    antithetic: bool = True,
    axis_name: AxisName | None = None,
) -> Scalar:
    """Equation (2) on a batch, per coordinate: `fit(model, data, loss=velocity_loss)`.

    **Arguments:** `x0`, data of shape (batch, ...); `cond`, as in `denoising_loss`;
    `coupling`, of x0 and the x1 drawn from the track's base, see `sdegen.coupling`;
    `times`, a law of `sdegen.times` that needs t_min and t_max alone (default:
    uniform); `antithetic`, False takes one z for each sample, and with `bridge` the
    loss then has an infinite variance; `axis_name`, see `denoising_loss`.
    """
    if x0.ndim < 2:
        raise ValueError(
            "velocity_loss takes a batch of data of shape (batch, ...) with at least "
            f"one axis per sample, got shape {x0.shape}. Use x0[:, None] for 1-D data."
        )
    track, dtype = model.track, jnp.promote_types(x0.dtype, jnp.float32)
    index, total = jnp.arange(x0.shape[0]), x0.shape[0]
    if axis_name is not None:
        index = index + total * jax.lax.axis_index(axis_name)
        total = total * jax.lax.axis_size(axis_name)
    time_key, end_key, noise_key, pair_key = jax.random.split(key, 4)
    # Stratified, and inside (0, 1): at the ends gamma' may be infinite.
    u = (jax.random.uniform(time_key, (), dtype) + index) / total
    eps = jnp.finfo(dtype).eps
    u = jnp.clip(u.astype(dtype), eps, 1 - eps)
    t = (Uniform() if times is None else times).quantile(track, u)

    def each(key, draw):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
        return jax.vmap(lambda k: draw(k, x0.shape[1:], x0.dtype))(keys)

    x0, x1 = coupling(pair_key, x0, each(end_key, track.base.sample))
    z = each(noise_key, jax.random.normal)

    def see(z):
        """(x_t, its velocity, b, z - z_hat) of the batch."""
        x = jax.vmap(track.point)(t, x0, x1, z).astype(x0.dtype)
        v = jax.vmap(track.velocity)(t, x0, x1, z).astype(x0.dtype)
        pair = isinstance(model.network, tuple)
        miss = z - model.latent(t, x, cond) if pair else jnp.zeros_like(x)
        return v, model.velocity(t, x, cond), miss

    v, b, miss = see(z)
    if track.gamma(track.t_max) is None or not antithetic:
        return jnp.mean((b - v) ** 2) + jnp.mean(miss**2)
    v_, b_, miss_ = see(-z)
    mean, odd = (v + v_) / 2, (v - v_) / 2  # dI/dt and gamma' z
    loss = ((b - mean) ** 2 + (b_ - mean) ** 2 + miss**2 + miss_**2) / 2
    return jnp.mean(loss - (b - b_) * odd)
