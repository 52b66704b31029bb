"""Predictor and corrector: a step of the reverse SDE, then Langevin dynamics."""

import math

import equinox as eqx

from ..typing import Scalar, number
from .semilinear import decay, kept, root
from .solver import AbstractSemilinearSolver


class Langevin(AbstractSemilinearSolver):
    """The step of `DPMSolverSDE(1)`, then `corrections` of Langevin dynamics.

    Song et al. 2021, "Score-based generative modeling through SDEs", algorithms 1 and
    4. Each correction is y <- y + e score + sqrt(2 e) noise at the new noise level with
    e = 2 (snr sigma)^2. The paper's step also has a ratio of norms over the batch,
    which is about 1: left out, because a step that depends on the sample would not keep
    its law. Evaluations: 1 + `corrections` a step.
    """

    corrections: int = eqx.field(default=1, static=True)
    snr: Scalar = number(0.16)

    family = math.inf
    draws = True

    @property
    def calls(self):
        """Network evaluations of one step."""
        return 1 + self.corrections

    def advance(self, term, here, there, y, state):
        """A step and its corrections."""
        x0, z = term.posterior_means(here, y)
        keep = kept(decay(here, there)[0], term.stochasticity)
        y = there.a * x0 + there.tau * keep * z
        if term.stochasticity is not None:
            y = y + there.tau * root(1 - keep**2) * term.normal()
        snr = self.snr.astype(y.dtype)
        for i in range(self.corrections):
            z = term.posterior_means(there, y)[1]
            # e score = -2 snr^2 sigma z, sqrt(2 e) = 2 snr sigma
            y = y + 2 * snr * there.tau * (term.normal(i + 1) - snr * z)
        return y, None, None

    def __check_init__(self):
        if not (isinstance(self.corrections, int) and self.corrections >= 1):
            raise ValueError(
                "Langevin needs a whole number of corrections >= 1, got "
                f"{self.corrections!r}."
            )
