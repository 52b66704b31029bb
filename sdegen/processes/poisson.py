"""Flows by Green's functions: Poisson flows and general radial kernels.

Mass at one point spreads with a radial distribution function psi(r / t), by the
velocity (x - x0) / t (Su 2022, "Constructing diffusion ODEs by Green's functions"):

    x_t = x0 + t z,    z distributed as `Radial(psi)`                              (1)

In Poisson flows data are charges in a space of D more dimensions. The electric field at
height r = sigma sqrt(D) over N data dimensions is that of the kernel

    p_r(x | x0) ~ (|x - x0|^2 + r^2)^(-(N + D) / 2)                                (2)

which is the distribution of x = x0 + sigma z with z of a multivariate Student
distribution with D degrees of freedom. The field lines are the flow of that path.
"""

import equinox as eqx
import jax.numpy as jnp

from ..typing import Scalar, ScalarLike, float_array, is_traced, number
from .noise import AbstractNoise, Radial, StudentT
from .ve import AbstractNoiseTime


class GreenFlow(AbstractNoiseTime):
    """Equation (1), by default with psi = tanh(r / t).

    Another kernel: `GreenFlow(noise=Radial(lambda r: 1 - jnp.exp(-r)))`.
    """

    t_min: Scalar = number(1e-3)
    t_max: Scalar = number(40.0)
    noise: AbstractNoise = eqx.field(default_factory=Radial)


class PoissonFlow(AbstractNoiseTime):
    """alpha = 1, sigma = t with Student noise of `dof` degrees of freedom: PFGM++.

    Xu et al. 2023, "PFGM++: Unlocking the potential of physics-inspired generative
    models", eq. 4 and theorem 4.1. dof = 1 is PFGM (Xu et al. 2022, "Poisson flow
    generative models"), dof to infinity is EDM. The noise has no variance for dof <= 2:
    a network then needs `sdegen.nets.HeavyTailed` around it.

    **Arguments:**
    - `dof`: D in (2), default 128.
    - `t_min`, `t_max`: see `AbstractSDE`; defaults 1e-3 and 40 (PFGM's) for dof < 2,
      0.002 and 80 (EDM's) for more.
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
        few = self.dof < 2
        t_min = jnp.where(few, 1e-3, 2e-3) if t_min is None else t_min
        t_max = jnp.where(few, 40.0, 80.0) if t_max is None else t_max
        self.t_min, self.t_max = float_array(t_min), float_array(t_max)

    @property
    def noise(self):
        """The Student distribution of z."""
        return StudentT(self.dof)
