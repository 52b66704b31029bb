"""What a network predicts: one row (a, b) with pred = a x0 + b z.

With x_t = alpha x0 + sigma z it is a 2x2 system, so every prediction gives x0 and z:

    | alpha sigma | |x0|   |x_t |          x0 = (b x_t - sigma pred) / det
    |   a     b   | |z | = |pred|          z = (alpha pred - a x_t) / det           (1)
                                           det = alpha b - sigma a

At a given x_t the squared errors of two predictions differ by the factor

    ((a2 sigma - b2 alpha) / (a1 sigma - b1 alpha))^2 = (det2 / det1)^2             (2)
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._compat import renamed as _renamed
from ..typing import Levels, PyTree, ScalarLike, Time
from .path import AbstractPath

Batch: TypeAlias = Float[Array, "batch ..."]


@runtime_checkable
class PosteriorMeans(Protocol):
    """What solvers and losses need of a denoiser: its path and two posterior means.

    Arguments of the methods: `t`, times, () or (batch,); `x`, states, (batch, ...);
    `cond`, what the network is conditioned on, default None.
    """

    path: AbstractPath

    def posterior_means(
        self, t: Time, x: Batch, cond: PyTree = None
    ) -> tuple[Batch, Batch]:  # pyright: ignore[reportReturnType]
        """(E[x0 given x_t], E[z given x_t])."""

    def eps(self, t: Time, x: Batch, cond: PyTree = None) -> Batch:  # pyright: ignore[reportReturnType]
        """E[z given x_t]."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network predicts, as a row (a, b).

    **Arguments:**
    - `name`: shown by `repr`.
    - `row`: (path, t, sigma_data) -> (a, b) for a scalar t; `sigma_data` is the
      standard deviation of the data.
    """

    name: str
    row: Callable[[AbstractPath, ScalarLike, Levels], tuple[Array, Array]]

    def __repr__(self):
        return self.name

    def det(self, path: AbstractPath, t: ScalarLike, sigma_data: Levels) -> Array:
        """The determinant of (1), for a scalar t; its square scales squared errors."""
        a, b = self.row(path, t, sigma_data)
        return path.alpha(t) * b - path.sigma(t) * a


def _score(path, t, sigma_data):
    if not path.noise.gaussian:
        raise ValueError(
            "the score is -z / sigma only where the noise z is Gaussian, but "
            f"{type(path).__name__} has noise={type(path.noise).__name__}. Predict x0, "
            "eps, velocity or v instead."
        )
    return jnp.zeros_like(t), -1 / path.sigma(t)


def _edm(path, t, sigma_data):
    # F of D = c_skip x + c_out F (Karras et al. 2022, eq. 7 and table 1), written for
    # x_t = alpha x0 + sigma z; it stays finite where alpha or sigma vanishes.
    alpha, sigma = path.alpha(t), path.sigma(t)
    scale = jnp.sqrt(sigma**2 + (alpha * sigma_data) ** 2)
    return sigma / (sigma_data * scale), -alpha * sigma_data / scale


x0 = Prediction("x0", lambda path, t, std: (jnp.ones_like(t), jnp.zeros_like(t)))
"""The data: (1, 0)."""
eps = Prediction("eps", lambda path, t, std: (jnp.zeros_like(t), jnp.ones_like(t)))
"""The noise: (0, 1). Ho et al. 2020."""
score = Prediction("score", _score)
"""The score of x_t: (0, -1/sigma), Gaussian noise only. Song et al. 2021."""
velocity = Prediction("velocity", lambda path, t, std: path.rates(t))
"""dx/dt of the flow: (alpha', sigma'). Lipman et al. 2023, Liu et al. 2023."""
v = Prediction("v", lambda path, t, std: (-path.sigma(t), path.alpha(t)))
"""(-sigma, alpha). Salimans and Ho 2022, with alpha^2 + sigma^2 = 1."""
edm = Prediction("edm", _edm)
"""EDM's unit-variance target, for any path. Karras et al. 2022."""


def posterior_means(
    row: tuple[Array, Array], alpha: Array, sigma: Array, x: Array, prediction: Array
) -> tuple[Array, Array]:
    """(x0, z) by the solution of (1); all arguments broadcast.

    **Arguments:**
    - `row`: (a, b) of the prediction.
    - `alpha`, `sigma`: the scales of the path.
    - `x`, `prediction`: the state x_t and what the network predicts at it.
    """
    a, b = row
    det = alpha * b - sigma * a
    return (b * x - sigma * prediction) / det, (alpha * prediction - a * x) / det


__getattr__ = _renamed(__name__)
