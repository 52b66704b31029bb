"""Poisson flows: data as charges in a space of D more dimensions.

With N data dimensions, D more and r = sigma sqrt(D), the electric field of the data at
height r is that of the kernel

    p_r(x | x0) ~ (|x - x0|^2 + r^2)^(-(N + D) / 2)                                (1)

which is the law of x = x0 + sigma z with z of a multivariate Student law with D degrees
of freedom. A field line obeys dx/dsigma = (x - E[x0 | x]) / sigma: it is the
probability flow of that path, and nothing else is needed.
"""

import jax.numpy as jnp

from ..typing import Scalar, ScalarLike, float_array, is_traced
from .noise import StudentT
from .path import AbstractPath


class PoissonFlow(AbstractPath):
    """alpha = 1, sigma = t with Student noise of `dof` degrees of freedom: PFGM++.

    Xu et al. 2023, "PFGM++: Unlocking the potential of physics-inspired generative
    models", eq. 4 and theorem 4.1. dof = 1 is PFGM (Xu et al. 2022, "Poisson flow
    generative models", where t is the height z), dof to infinity is EDM. The times are
    PFGM's, from 1e-3 to 40, for one more dimension, and EDM's, from 0.002 to 80,
    for more.

    The variance of the noise is dof / (dof - 2): for two more dimensions or fewer there
    is none, and a network wants `sdegen.nets.HeavyTailed` around it.
    """

    dof: Scalar
    t_min: Scalar
    t_max: Scalar

    def __init__(
        self,
        dof: ScalarLike = 128.0,
        *,
        t_min: ScalarLike | None = None,
        t_max: ScalarLike | None = None,
    ):
        self.dof = float_array(dof)
        if not is_traced(self.dof) and not float(self.dof) > 0:
            raise ValueError(
                "PoissonFlow needs a positive number dof of more dimensions, got "
                f"{float(self.dof):g}. 1 is PFGM, 128 a good choice for images."
            )
        one = self.dof < 2
        self.t_min = float_array(
            jnp.where(one, 1e-3, 0.002) if t_min is None else t_min
        )
        self.t_max = float_array(jnp.where(one, 40.0, 80.0) if t_max is None else t_max)

    @property
    def noise(self):
        """The Student law of z."""
        return StudentT(self.dof)

    def alpha(self, t):
        """1."""
        return jnp.ones_like(t)

    def sigma(self, t):
        """t."""
        return 1.0 * t
