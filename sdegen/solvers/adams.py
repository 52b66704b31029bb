"""An adaptive exponential solver: Adams with an embedded estimate of its error."""

import diffrax as dfx

from ..processes import prediction as kinds
from .multistep import AbstractAdams


class ExponentialAdams(AbstractAdams, dfx.AbstractAdaptiveSolver):
    """Adams-Bashforth-Moulton of a splitting, for adaptive steps: one evaluation each.

    The predictor has order `order`, the corrector one more; what they differ by is the
    error estimate, and the corrected point goes on. An evaluation at the end of each
    attempted step and one before the first are all it costs (Hairer, Norsett, Wanner,
    "Solving ordinary differential equations I", section III.5 for variable steps).
    `prediction` and `sigma_data` as in `DEIS`. It starts with the first order and short
    steps. For the flow only, with `Adaptive`; on a fixed grid `UniPC` does the same for
    one evaluation less.
    """

    calls_first = 1

    def __init__(self, order=3, prediction=kinds.edm, sigma_data=0.5):
        """`order` 1 to 4, of the predictor."""
        super().__init__(order, None, prediction, sigma_data)

    def error_order(self, terms):
        """The local order of the error estimate."""
        return self.points + 1

    def rows(self, nodes):
        """None: the steps are not known before."""
        return None

    def start(self, term, here, there, y):
        """The prediction at the start."""
        return term.posterior_means(here, y), super().start(term, here, there, y)

    def advance(self, term, here, there, y, state):
        """Predict, evaluate, correct."""
        means, history = state
        predicted, history = self.predict(None, here, there, y, means, history)
        means = term.posterior_means(there, predicted)
        y1 = self.correct(None, there, predicted, means, history)
        return y1, y1 - predicted, (means, history)
