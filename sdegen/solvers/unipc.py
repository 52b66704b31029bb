"""UniPC: a predictor and a corrector at one network evaluation a step."""

import equinox as eqx

from ..processes import prediction as kinds
from ..processes.prediction import Prediction
from ..typing import Scalar, float_array
from . import multistep
from .semilinear import splitting
from .solver import whole


class UniPC(multistep.AbstractAdams):
    """Exponential Adams predictor and corrector, one network evaluation a step.

    Zhao et al. 2023, "UniPC: a unified predictor-corrector framework", algorithm 1:
    the evaluation that the next step needs anyway corrects the step that led there. The
    predictor has order `order`, 1 to 4, the corrector `corrector`, one more unless
    given (2 to 5); their weights are the exact integrals, which both B(h) of the paper
    approximate. `prediction` and `sigma_data` as in `DEIS`; the default, in the angle
    in which data of that standard deviation have unit speed, was the best of all on
    mixtures. For the flow only.
    """

    points: int = eqx.field(static=True)
    corrector: int = eqx.field(static=True)
    prediction: Prediction = eqx.field(static=True)
    sigma_data: Scalar
    weights: multistep.Weights | None

    def __init__(
        self,
        order=3,
        corrector=None,
        prediction=kinds.edm,
        sigma_data=0.5,
        weights=None,
    ):
        """`weights` come from `learn_grid`."""
        self.points = whole("the order of UniPC", order, 1, 4)
        corrector = order + 1 if corrector is None else corrector
        self.corrector = whole("the corrector's order in UniPC", corrector, 2, 5)
        splitting(prediction)
        self.prediction = prediction
        self.sigma_data = float_array(sigma_data)
        self.weights = weights

    def advance(self, term, here, there, y, state):
        """One evaluation: correct y, then predict."""
        means = term.posterior_means(here, y)
        y = self.correct(term.row, here, y, means, state)
        y1, state = self.predict(term.row, here, there, y, means, state)
        return y1, None, state
