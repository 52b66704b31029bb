"""A network together with the noise schedule that is learned with it."""

from typing import Any

import equinox as eqx

from ..processes import prediction
from ..processes.learned_schedule import LearnedSchedule
from ..processes.prediction import Prediction
from ..typing import Scalar, number
from .denoiser import Denoiser


class VDM(eqx.Module):
    """A pair (network, gamma) that `fit` trains together, with loss=`vdm_loss`.

    `.denoiser` is what one samples from: the network on its schedule. Kingma et al.
    2021, "Variational diffusion models".
    """

    network: Any  # the pair, under the name of what `fit` trains
    prediction: Prediction = eqx.field(default=prediction.edm, static=True)
    sigma_data: Scalar = number(0.5)

    @property
    def denoiser(self) -> Denoiser:
        """The network on the schedule as it is now."""
        network, gamma = self.network
        return Denoiser(
            network, LearnedSchedule(gamma), self.prediction, self.sigma_data
        )
