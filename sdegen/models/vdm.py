"""A network together with the noise schedule that is learned with it."""

from typing import Any

import equinox as eqx

from ..losses.variational import vdm_loss
from ..processes import prediction
from ..processes.learned_schedule import Gamma, LearnedSchedule
from ..processes.prediction import Prediction
from ..typing import Scalar, number
from .denoiser import AbstractDenoiser, Denoiser


class VDM(AbstractDenoiser):
    """A denoiser whose network and noise schedule are trained together.

    Kingma et al. 2021, "Variational diffusion models".

    **Arguments:**
    - `network`: a callable pytree (time, x, cond) on batches, as of `Denoiser`.
    - `gamma`: the schedule, a `Gamma`, minus the log-SNR as a function of time.
    - `prediction`: what the network predicts, a row of `sdegen.prediction`; `edm`.
    - `sigma_data`: the standard deviation of the data, a number; 0.5.
    """

    network: Any
    gamma: Any = eqx.field(default_factory=Gamma)
    prediction: Prediction = eqx.field(default=prediction.edm, static=True)
    sigma_data: Scalar = number(0.5)

    trainable = ("network", "gamma")
    loss = vdm_loss  # pyright: ignore[reportAssignmentType]
    data_scale = property(lambda self: self.sigma_data)

    @property
    def path(self) -> LearnedSchedule:
        """The process of the schedule as it is now."""
        return LearnedSchedule(self.gamma)

    @property
    def denoiser(self) -> Denoiser:
        """The same denoiser with the schedule as it is now."""
        return Denoiser(self.network, self.path, self.prediction, self.sigma_data)

    def posterior_means(self, t, x, cond=None):
        """(E[x0 given x_t], E[z given x_t])."""
        return self.denoiser.posterior_means(t, x, cond)
