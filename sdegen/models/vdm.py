"""A network together with the noise schedule that is learned with it."""

import dataclasses
from typing import Any

import equinox as eqx

from ..losses.variational import vdm_loss
from ..processes import prediction
from ..processes.learned_schedule import Gamma, LearnedSchedule
from ..processes.normaliser import Normaliser, normalised
from ..processes.path import AbstractPath
from ..processes.prediction import Prediction
from ..typing import Scalar, number
from .denoiser import AbstractDenoiser, Denoiser, check_sigma_data


class VDM(AbstractDenoiser):
    """A denoiser whose network and noise schedule are trained together.

    Kingma et al. 2021, "Variational diffusion models".

    **Arguments:**
    - `network`: a callable pytree (time, x, cond) on batches, as of `Denoiser`.
    - `gamma`: the schedule, a `Gamma`, minus the log-SNR as a function of time.
    - `prediction`: what the network predicts, a row of `sdegen.prediction`; `edm`.
    - `sigma_data`: the standard deviation of the data, a number. Without it `fit`
      measures the data and gives the model their units; an untrained model takes 0.5.
    - `normaliser`: the units of the data; none.
    """

    network: Any
    gamma: Any = eqx.field(default_factory=Gamma)
    prediction: Prediction = eqx.field(default=prediction.edm, static=True)
    sigma_data: Scalar | None = number(None)
    normaliser: Normaliser | None = None

    trainable = ("network", "gamma")
    loss = vdm_loss  # pyright: ignore[reportAssignmentType]

    @property
    def path(self) -> AbstractPath:
        """The process of the schedule as it is now."""
        path = LearnedSchedule(self.gamma)
        return path if self.normaliser is None else normalised(path, self.normaliser)

    def normalise(self, normaliser: Normaliser) -> "VDM":
        """The model for data in the units of `normaliser`, in which sigma_data is 1."""
        return dataclasses.replace(self, normaliser=normaliser, sigma_data=1.0)

    @property
    def denoiser(self) -> Denoiser:
        """The same denoiser with the schedule as it is now."""
        return Denoiser(self.network, self.path, self.prediction, self.sigma_data)

    def posterior_means(self, t, x, cond=None):
        """(E[x0 given x_t], E[z given x_t])."""
        return self.denoiser.posterior_means(t, x, cond)

    def __check_init__(self):
        check_sigma_data(self)
