"""UniPC: a predictor and a corrector at one network evaluation a step."""

from ..processes import prediction as kinds
from .multistep import AbstractAdams
from .solver import whole


class UniPC(AbstractAdams):
    """Exponential Adams predictor and corrector, one network evaluation a step.

    Zhao et al. 2023, "UniPC: a unified predictor-corrector framework", algorithm 1:
    the evaluation that the next step needs anyway corrects the step that led there. The
    predictor has order `order`, 1 to 4, the corrector `corrector`, one more unless
    given (2 to 5); their weights are the exact integrals, which both B(h) of the paper
    approximate. `prediction` and `sigma_data` as in `DEIS`; the default, in the angle
    in which data of that standard deviation have unit speed, was the best of all on
    mixtures. For the flow only.
    """

    def __init__(
        self,
        order=3,
        corrector=None,
        prediction=kinds.edm,
        sigma_data=0.5,
        weights=None,
    ):
        """`weights` come from `learn_grid`."""
        super().__init__(order, corrector, prediction, sigma_data, weights)
        whole("the corrector's order in UniPC", self.corrector, 2, 5)
