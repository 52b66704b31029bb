"""Loss weights: (path, t, kind, sigma_data) -> weight on the squared error of `kind`.

Each is defined where its paper defines it (on the x0, eps or score error) and carried
to `kind` by equation (2) of `sdegen.prediction`: a weight means the same objective for
every kind.

**Arguments** of each:
- `path`: the path.
- `t`: the time, a scalar.
- `kind`: what the network predicts.
- `sigma_data`: the standard deviation of the data.
"""

import equinox as eqx
import jax.numpy as jnp

from ..processes import prediction
from ..processes.path import AbstractPath
from ..processes.prediction import Prediction
from ..processes.sde import AbstractLinearSDE
from ..typing import Levels, Scalar, ScalarLike, number


def _carry(source: Prediction, path, t, kind: Prediction, sigma_data):
    """(det_source / det_kind)^2: a weight on the error of `source` as one on `kind`."""
    return (source.det(path, t, sigma_data) / kind.det(path, t, sigma_data)) ** 2


def uniform(path: AbstractPath, t: ScalarLike, kind: Prediction, sigma_data: Levels):
    """1 on what the network predicts: DDPM's simple loss, the flow-matching loss."""
    return jnp.ones_like(t)


def likelihood(path: AbstractPath, t: ScalarLike, kind: Prediction, sigma_data: Levels):
    """g(t)^2 on the score error: bounds the likelihood. Song et al. 2021b, eq. 7."""
    if not isinstance(path, AbstractLinearSDE):
        raise ValueError(
            "the likelihood weight is g(t)^2 and needs a linear SDE, got the path "
            f"{type(path).__name__}, which has no diffusion. Choose another weight."
        )
    g = path.diffusion(t, jnp.zeros(()))
    return g**2 * _carry(prediction.score, path, t, kind, sigma_data)


def snr(path: AbstractPath, t: ScalarLike, kind: Prediction, sigma_data: Levels):
    """alpha^2/sigma^2 on the x0 error, which is 1 on the eps error. Ho et al. 2020."""
    return _carry(prediction.eps, path, t, kind, sigma_data)


class MinSNR(eqx.Module):
    """min(SNR, gamma) on the x0 error. Hang et al. 2023, "Min-SNR weighting", eq. 8.

    **Arguments:**
    - `gamma`: the largest weight, default 5.
    """

    gamma: Scalar = number(5.0)

    def __call__(self, path, t, kind, sigma_data):
        """The weight at time t."""
        # min(SNR, gamma) = SNR min(1, gamma / SNR): no overflow where sigma is small
        ratio = path.sigma(t) ** 2 * self.gamma / path.alpha(t) ** 2
        return snr(path, t, kind, sigma_data) * jnp.minimum(1.0, ratio)


def edm(path: AbstractPath, t: ScalarLike, kind: Prediction, sigma_data: Levels):
    """(s^2 + sigma_data^2) / (s sigma_data)^2 on the x0 error, s = sigma / alpha.

    It is 1 on the `edm` kind. Karras et al. 2022, table 1.
    """
    return _carry(prediction.edm, path, t, kind, sigma_data)
