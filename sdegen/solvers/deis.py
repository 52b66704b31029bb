"""DEIS: exponential Adams-Bashforth."""

from ..processes import prediction as kinds
from .multistep import AbstractAdams


class DEIS(AbstractAdams):
    """Exponential Adams-Bashforth of order 1 to 4, one network evaluation a step.

    Zhang and Chen 2023, "Fast sampling of diffusion models with exponential
    integrator", eq. 14, with its polynomial in the log-SNR. `prediction` is what the
    polynomial passes through: `eps` as in the paper, `x0`, `velocity` (in flow time) or
    `edm` (in the angle, for data of standard deviation `sigma_data`). Order 1 is DDIM
    for all but edm. For the flow only.
    """

    def __init__(self, order=3, prediction=kinds.eps, sigma_data=0.5, weights=None):
        """`weights` come from `learn_grid`."""
        super().__init__(order, 0, prediction, sigma_data, weights)
