"""How far is x_T from the noise that sampling starts from?

x_T = alpha_T x0 + sigma_T z still holds some of the data, and a sampler starts from
sigma_T z alone. For data of unit standard deviation what is left is

    signal = alpha_T / sigma_T,                                                    (1)

an upper bound of W2(x_T, sigma_T z) / sigma_T, the distance by the best coupling.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from ..processes.path import AbstractPath
from .report import Row, measured
from .tables import Clock
from .test_data import data

_BAR = 0.05


def terminal_rows(clock: Clock, path: AbstractPath) -> list[Row]:
    """Equation (1), with W2 as a remark where the noise is Gaussian."""
    remark = ""
    if path.noise.gaussian:
        distance = float(_w2(data().standardised(), *clock.scales(clock.high)))
        remark = f"W2(x_T, sigma_T z) = {distance:.2g} sigma_T for 1-D data of unit std"
    if not clock.ratio <= _BAR:
        remark += "\nx_T is not the pure noise of a sampler: raise t_max or the noise"
    what = "signal left at t_max, alpha_T / sigma_T"
    return [measured("terminal", "noise end", what, clock.ratio, _BAR, "", remark)]


@eqx.filter_jit
def _w2(data, alpha, sigma):
    q = jnp.asarray((np.arange(4000) + 0.5) / 4000)
    gap = data.quantile(q, alpha, sigma) / sigma - norm.ppf(q)
    return jnp.sqrt(jnp.mean(gap**2))
