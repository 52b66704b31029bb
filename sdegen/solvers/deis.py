"""DEIS: exponential Adams-Bashforth."""

import equinox as eqx

from ..processes import prediction as kinds
from ..processes.prediction import Prediction
from ..typing import Scalar, float_array
from . import multistep
from .semilinear import splitting
from .solver import whole


class DEIS(multistep.AbstractAdams):
    """Exponential Adams-Bashforth of order 1 to 4, one network evaluation a step.

    Zhang and Chen 2023, "Fast sampling of diffusion models with exponential
    integrator", eq. 14, with its polynomial in the log-SNR. `prediction` is what the
    polynomial passes through: `eps` as in the paper, `x0`, `velocity` (in flow time) or
    `edm` (in the angle, for data of standard deviation `sigma_data`). Order 1 is DDIM
    for all but edm. For the flow only.
    """

    points: int = eqx.field(static=True)
    corrector: int = eqx.field(static=True)
    prediction: Prediction = eqx.field(static=True)
    sigma_data: Scalar
    weights: multistep.Weights | None

    def __init__(self, order=3, prediction=kinds.eps, sigma_data=0.5, weights=None):
        """`weights` come from `learn_grid`."""
        self.points, self.corrector = whole("the order of DEIS", order, 1, 4), 0
        splitting(prediction)
        self.prediction = prediction
        self.sigma_data = float_array(sigma_data)
        self.weights = weights

    def advance(self, term, here, there, y, state):
        """One evaluation, one step."""
        means = term.posterior_means(here, y)
        y1, state = self.predict(term.row, here, there, y, means, state)
        return y1, None, state
