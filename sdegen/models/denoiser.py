"""A network with the path it lives on and what it predicts: E[x0 given x_t].

    score = -z_hat / sigma,   velocity = alpha' x0_hat + sigma' z_hat               (1)

where (x0_hat, z_hat) are the posterior means E[x0], E[z] given x_t. The network sees x
/ sqrt(sigma^2 + (alpha sigma_data)^2), which has unit variance, and the time
log(sigma / alpha) / 4 (Karras et al. 2022, table 1, for any path).
"""

import abc
import dataclasses
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
from ..processes.normaliser import Normaliser, normalised
from ..processes.path import AbstractPath, basis_of, batched, level_of
from ..processes.prediction import Prediction
from ..typing import PyTree, Scalar, ScalarLike, Time, float_array, is_traced, number
from .model import AbstractModel, Points, call_network, check_gaussian, of_one
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


class AbstractDenoiser(AbstractModel):
    """A function from (t, x) to the posterior means of both ends of the path.

    `cond` is a pytree of arrays or None. On a path with a basis x, x0 and z are in its
    coordinates; networks see data.
    """

    path: eqx.AbstractVar[AbstractPath]
    sigma_data = None

    @abc.abstractmethod
    def posterior_means(
        self, t: Time, x: Points, cond: PyTree = None
    ) -> tuple[Points, Points]:
        """(E[x0 given x_t], E[z given x_t])."""

    def coefficients(self, t: ScalarLike) -> PyTree:
        """What the model needs to know of a time, for a scalar t; t itself by default.

        On a fixed grid it is made once, for all times together, outside of the loop.
        """
        return float_array(t)

    def means_from(
        self, known: PyTree, x: Points, cond: PyTree = None
    ) -> tuple[Points, Points]:
        """`posterior_means` at the time of these `coefficients`."""
        return self.posterior_means(known, x, cond)

    @property
    def data_scale(self) -> Float[Array, "..."]:
        """The standard deviation of the data, or of each coordinate; 0.5 if unknown.

        Of data in the units of the path's `Normaliser`, where it has one.
        """
        return float_array(0.5 if self.sigma_data is None else self.sigma_data)

    @property
    def overall_sigma_data(self) -> Scalar:
        """The root mean square of `data_scale` over all coordinates."""
        scale = self.data_scale
        return jnp.sqrt(jnp.mean(scale**2)) if scale.ndim else scale

    def problem(self, shape, *, cond, start, **options):
        """The flow, or a reverse SDE, of the path; see `AbstractModel.problem`."""
        return path_problem(self, shape, **options)

    def __call__(self, t: Time, x: Points, cond: PyTree = None) -> Points:
        """E[x0 given x_t], the denoised point."""
        return self.posterior_means(t, x, cond)[0]

    def eps(self, t: Time, x: Points, cond: PyTree = None) -> Points:
        """E[z given x_t], the noise."""
        return self.posterior_means(t, x, cond)[1]

    def score(self, t: Time, x: Points, cond: PyTree = None) -> Points:
        """The gradient of log p_t at x, for Gaussian noise."""
        check_gaussian(self.path, "the score is -z / sigma only for")
        sigma = batched(self.path.sigma, float_array(t), x)
        return -self.posterior_means(t, x, cond)[1] / sigma

    def sample_score(self, t: ScalarLike, x: Array, cond: PyTree = None) -> Array:
        """The score for one sample, as `reverse` and `probability_flow` take it."""
        return of_one(self.score, float_array(t), x, cond)

    def velocity(self, t: Time, x: Points, cond: PyTree = None) -> Points:
        """dx/dt of the probability flow, finite at both ends of the path."""
        x0, z = self.posterior_means(t, x, cond)
        da, ds = batched(self.path.rates, float_array(t), x)
        return da * x0 + ds * z


class PosteriorMean(AbstractDenoiser):
    """A denoiser on `path` from `mean`, (t, x, cond) -> E[x0 given x_t] on batches."""

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

    **Arguments:**
    - `network`: a callable pytree on batches, such as a Flax NNX module.
    - `path`: the path.
    - `prediction`: what it predicts, a row of `sdegen.prediction`; `edm`.
    - `sigma_data`: the standard deviation of the data, one number or one for each
      coordinate. Without it `fit` measures the data and gives the model their units,
      see `normalise`; an untrained model takes 0.5.
    - `inputs`: what the network is shown, `edm_inputs` or `raw_inputs`; `edm_inputs`.

    States and times keep their precision, whatever the network computes in.
    """

    network: Any
    path: AbstractPath
    prediction: Prediction = eqx.field(default=prediction.edm, static=True)
    sigma_data: Float[Array, "..."] | None = number(None)
    inputs: Callable = eqx.field(default=edm_inputs, static=True)

    loss = denoising_loss  # pyright: ignore[reportAssignmentType]

    @property
    def normaliser(self) -> Normaliser | None:
        """The units of the data, where the path has them."""
        basis = basis_of(self.path)
        return basis if isinstance(basis, Normaliser) else None

    def normalise(self, normaliser: Normaliser) -> "Denoiser":
        """The model for data in the units of `normaliser`, in which sigma_data is 1."""
        path = normalised(self.path, normaliser)
        return dataclasses.replace(self, path=path, sigma_data=1.0)

    def predict(
        self,
        t: Time,
        x: Points,
        cond: PyTree = None,
        *,
        keys: Key[Array, " batch"] | None = None,
    ) -> Points:
        """The network's output at x_t, in the units of its kind.

        `keys`, in training alone, are for a network that takes `key` (dropout).
        """
        t = float_array(t)
        _check_time(t, x)
        inputs = lambda t: self.inputs(self.path, t, self.data_scale)  # noqa: E731
        return self._output(batched(inputs, t, x), x, cond, keys)

    def _output(self, inputs, x, cond, keys=None):
        time, scale = inputs
        time, basis = jnp.broadcast_to(time.ravel(), x.shape[:1]), _turn(self.path)
        data = basis.data((scale * x).astype(x.dtype))
        drops = keys is not None and "key" in inspect.signature(self.network).parameters
        dropout = {"key": keys} if drops else {}
        out = call_network(self.network, time, data, cond, **dropout)
        return basis.coordinates(out.astype(x.dtype))

    def posterior_means(self, t, x, cond=None):
        """(E[x0 given x_t], E[z given x_t])."""
        t = float_array(t)
        _check_time(t, x)
        return self.means_from(batched(self.coefficients, t, x), x, cond)

    def coefficients(self, t):
        """The network's inputs, the row of the prediction, alpha and sigma."""
        t, path, size = float_array(t), self.path, self.data_scale
        row = self.prediction.row(path, t, size)
        return self.inputs(path, t, size), (row, *path.scales(t))

    def means_from(self, known, x, cond=None):
        """`posterior_means` at the time of these `coefficients`."""
        inputs, rows = known
        return prediction.posterior_means(*rows, x, self._output(inputs, x, cond))

    def __check_init__(self):
        if not isinstance(self.path, AbstractPath):
            raise ValueError(
                f"a denoiser needs a path, such as sdegen.VP(), got {self.path!r:.60}. "
                "A process without alpha and sigma is reversed by `sdegen.reverse`."
            )
        if not isinstance(self.prediction, Prediction):
            rows = (k for k, o in vars(prediction).items() if type(o) is Prediction)
            raise ValueError(
                f"prediction must be a row of sdegen.prediction ({', '.join(rows)}), "
                f"got {self.prediction!r}. For example: sdegen.prediction.velocity."
            )
        # Refuses a score on a base that is not Gaussian, before anything is traced.
        check_sigma_data(self)
        jax.eval_shape(self.prediction.row, self.path, self.path.t_min, self.data_scale)
        if is_traced((self.path, self.sigma_data)):
            return
        for t in (self.path.t_min, self.path.t_max):
            with jax.ensure_compile_time_eval():
                det = self.prediction.det(self.path, t, self.data_scale)
            if not np.all(np.asarray(det)):
                raise ValueError(
                    f"the prediction {self.prediction} says nothing about x0 at "
                    f"t={float(t):g} on {type(self.path).__name__}, where alpha or "
                    "sigma is 0. Use velocity, v, x0 or edm, or a smaller t_max."
                )


def _turn(path):
    return basis_of(path).orthonormal


def check_sigma_data(model: AbstractDenoiser) -> None:
    """Refuse a standard deviation that no data have."""
    given = model.sigma_data
    if given is None or is_traced(given):
        return
    if not (np.isfinite(given).all() and (np.asarray(given) > 0).all()):
        raise ValueError(
            "sigma_data is the standard deviation of the data, positive and finite, "
            f"got {np.asarray(given)}. Take data.std(), or leave it out: `fit` then "
            "measures the data."
        )


def _check_time(t, x):
    if x.ndim < 2 or t.ndim > 1 or (t.ndim == 1 and t.shape[0] != x.shape[0]):
        raise ValueError(
            "a denoiser takes x of shape (batch, ...) and t of shape () or "
            f"(batch,), got x of shape {x.shape} and t of shape {t.shape}."
        )
