"""A network with the path it lives on and what it predicts: E[x0 given x_t].

    score = -z_hat / sigma,   velocity = alpha' x0_hat + sigma' z_hat               (1)

where (x0_hat, z_hat) are the posterior means E[x0], E[z] given x_t. Nothing here
divides by alpha near the noise or by sigma near the data unless the prediction does.

Inputs of the network (Karras et al. 2022, table 1, for any path): x / sqrt(sigma^2 +
(alpha sigma_data)^2), which has unit variance, and the time log(sigma / alpha) / 4.
"""

import abc
import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ..losses.denoising import denoising_loss
from ..processes import prediction
from ..processes.path import AbstractPath, basis_of, batched, level_of
from ..processes.prediction import Prediction
from ..typing import PyTree, Scalar, ScalarLike, Time, float_array, is_traced, number
from .model import AbstractModel, call_network
from .path_problem import path_problem


def edm_inputs(path, t, sigma_data) -> tuple[Scalar, Float[Array, "..."]]:
    """(c_noise, c_in): log(sigma/alpha) / 4 and the scale to unit variance."""
    alpha, sigma = path.scales(t)
    a, s = level_of(alpha, sigma)
    # alpha may be 0 at the noise end: beyond sigma/alpha = 1000 all times look alike.
    log_ratio = jnp.log(s) - jnp.log(jnp.maximum(a, 1e-3 * s))
    return log_ratio / 4, 1 / jnp.sqrt(sigma**2 + (alpha * sigma_data) ** 2)


def raw_inputs(path, t, sigma_data) -> tuple[Scalar, Scalar]:
    """(t, 1): the network sees time and x_t as they are."""
    return t, jnp.ones_like(t)


def takes_key(network: Callable) -> bool:
    """Whether a network is called with random keys in training."""
    return "key" in inspect.signature(network).parameters


class AbstractDenoiser(AbstractModel):
    """A function from (t, x) to the posterior means of both ends of the path.

    t is () or (batch,), x is (batch, ...), `cond` any pytree of arrays or None. On a
    path with a basis x, x0 and z are in its coordinates; networks see data.
    """

    path: eqx.AbstractVar[AbstractPath]

    @abc.abstractmethod
    def posterior_means(
        self, t: Time, x: Float[Array, "batch ..."], cond: PyTree = None
    ) -> tuple[Float[Array, "batch ..."], Float[Array, "batch ..."]]:
        """(E[x0 given x_t], E[z given x_t])."""

    @property
    def data_scale(self) -> Float[Array, "..."]:
        """The standard deviation of the data, or of each coordinate; 0.5 if unknown."""
        return float_array(0.5)

    @property
    def overall_sigma_data(self) -> Scalar:
        """The root mean square of `data_scale` over all coordinates."""
        scale = self.data_scale
        return jnp.sqrt(jnp.mean(scale**2)) if scale.ndim else scale

    def problem(
        self, shape, *, solver, grid, stochasticity, denoise, refinable, cond, start
    ):
        """The flow, or a reverse SDE, of the path; see `AbstractModel.problem`."""
        return path_problem(
            self,
            shape,
            solver=solver,
            grid=grid,
            stochasticity=stochasticity,
            denoise=denoise,
            refinable=refinable,
        )

    def __call__(
        self, t: Time, x: Float[Array, "batch ..."], cond: PyTree = None
    ) -> Float[Array, "batch ..."]:
        """E[x0 given x_t], the denoised point."""
        return self.posterior_means(t, x, cond)[0]

    def eps(
        self, t: Time, x: Float[Array, "batch ..."], cond: PyTree = None
    ) -> Float[Array, "batch ..."]:
        """E[z given x_t], the noise."""
        return self.posterior_means(t, x, cond)[1]

    def score(
        self, t: Time, x: Float[Array, "batch ..."], cond: PyTree = None
    ) -> Float[Array, "batch ..."]:
        """The gradient of log p_t at x, for Gaussian noise."""
        if not self.path.noise.gaussian:
            raise ValueError(
                "the score is -z / sigma only for Gaussian noise, but "
                f"{type(self.path).__name__} has noise="
                f"{type(self.path.noise).__name__}."
            )
        return -self.posterior_means(t, x, cond)[1] / batched(
            self.path.sigma, float_array(t), x
        )

    def sample_score(
        self, t: ScalarLike, x: Float[Array, "..."], cond: PyTree = None
    ) -> Float[Array, "..."]:
        """The score for one sample, as `reverse` and `probability_flow` take it."""
        cond = jax.tree.map(lambda c: c[None], cond)
        return self.score(float_array(t), x[None], cond)[0]

    def velocity(
        self, t: Time, x: Float[Array, "batch ..."], cond: PyTree = None
    ) -> Float[Array, "batch ..."]:
        """dx/dt of the probability flow, finite at both ends of the path."""
        x0, z = self.posterior_means(t, x, cond)
        da, ds = batched(self.path.rates, float_array(t), x)
        return da * x0 + ds * z


class PosteriorMean(AbstractDenoiser):
    """A denoiser from a function (t, x, cond) -> E[x0 given x_t], on batches."""

    mean: Callable
    path: AbstractPath

    def posterior_means(self, t, x, cond=None):
        """(E[x0 given x_t], E[z given x_t])."""
        t = float_array(t)
        x0 = self.mean(t, x, cond)
        alpha, sigma = (batched(fn, t, x) for fn in (self.path.alpha, self.path.sigma))
        return x0, (x - alpha * x0) / sigma


class Denoiser(AbstractDenoiser):
    """A network (time, x, cond) -> prediction, with its path and its kind.

    **Arguments:** `network`, any callable pytree on batches (a Flax NNX module is one),
    which is given its time as (batch,), x and cond; `path`; `prediction`, a row of
    `sdegen.prediction`; `sigma_data`, the standard deviation of the data, one number or
    one for each coordinate; `inputs`, what the network is shown: `edm_inputs` or
    `raw_inputs`.

    The state stays in its own precision whatever the network computes in; times are
    never rounded to the network's precision here.
    """

    network: Any
    path: AbstractPath
    prediction: Prediction = eqx.field(default=prediction.edm, static=True)
    sigma_data: Float[Array, "..."] = number(0.5)
    inputs: Callable = eqx.field(default=edm_inputs, static=True)

    @property
    def data_scale(self):
        """`sigma_data`."""
        return self.sigma_data

    def loss(self, key, x0, cond=None, *, axis_name=None):
        """`denoising_loss` with its defaults."""
        return denoising_loss(self, key, x0, cond, axis_name=axis_name)

    def predict(
        self,
        t: Time,
        x: Float[Array, "batch ..."],
        cond: PyTree = None,
        *,
        keys: Key[Array, " batch"] | None = None,
    ) -> Float[Array, "batch ..."]:
        """The network's output at x_t, in the units of its kind.

        `keys`, one per sample, are for a network that takes `key` (dropout), in
        training alone; another network never hears of them.
        """
        t = float_array(t)
        _check_time(t, x)
        inputs = lambda t: self.inputs(self.path, t, self.sigma_data)  # noqa: E731
        time, scale = batched(inputs, t, x)
        time, basis = jnp.broadcast_to(time.ravel(), x.shape[:1]), basis_of(self.path)
        data = basis.data((scale * x).astype(x.dtype))
        dropout = {} if keys is None or not takes_key(self.network) else {"key": keys}
        out = call_network(self.network, time, data, cond, **dropout)
        return basis.coordinates(out.astype(x.dtype))

    def posterior_means(self, t, x, cond=None):
        """(E[x0 given x_t], E[z given x_t])."""
        t = float_array(t)
        _check_time(t, x)
        path = self.path

        def coefficients(t):
            return self.prediction.row(path, t, self.sigma_data), path.scales(t)

        row, (alpha, sigma) = batched(coefficients, t, x)
        return prediction.posterior_means(
            row, alpha, sigma, x, self.predict(t, x, cond)
        )

    def __check_init__(self):
        if not isinstance(self.path, AbstractPath):
            raise ValueError(
                "a denoiser needs a path, such as sdegen.VP(), got "
                f"{self.path!r:.60}. A process without alpha and sigma is reversed "
                "by `sdegen.reverse`."
            )
        if not isinstance(self.prediction, Prediction):
            known = ", ".join(
                k for k, o in vars(prediction).items() if type(o) is Prediction
            )
            raise ValueError(
                f"prediction must be a row of sdegen.prediction ({known}), got "
                f"{self.prediction!r}. For example: sdegen.prediction.velocity."
            )
        # Refuses a score on a base that is not Gaussian, before anything is traced.
        jax.eval_shape(self.prediction.row, self.path, self.path.t_min, self.sigma_data)
        if is_traced((self.path, self.sigma_data)):
            return
        for t in (self.path.t_min, self.path.t_max):
            with jax.ensure_compile_time_eval():
                det = self.prediction.det(self.path, t, self.sigma_data)
            if not np.all(np.asarray(det)):
                raise ValueError(
                    f"the prediction {self.prediction} says nothing about x0 at "
                    f"t={float(t):g} on {type(self.path).__name__}, where alpha or "
                    "sigma is 0. Use velocity, v, x0 or edm, or give the path a "
                    "smaller t_max."
                )


def _check_time(t, x):
    if x.ndim < 2 or t.ndim > 1 or (t.ndim == 1 and t.shape[0] != x.shape[0]):
        raise ValueError(
            "a denoiser takes x of shape (batch, ...) and t of shape () or "
            f"(batch,), got x of shape {x.shape} and t of shape {t.shape}."
        )
