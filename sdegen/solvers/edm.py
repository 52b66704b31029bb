"""EDM's sampler: Heun's method in sigma / alpha, with churn."""

import jax.numpy as jnp
import numpy as np

from ..typing import Scalar, number
from .semilinear import ddim, root
from .solver import AbstractSemilinearSolver


class EDMHeun(AbstractSemilinearSolver):
    """Heun's method in r = sigma / alpha, order 2, two evaluations a step, with churn.

    Karras et al. 2022, "Elucidating the design space of diffusion-based generative
    models", algorithm 2, for any path. Its N noise levels and last step to 0 are
    `KarrasGrid(N - 1)` with `sample(..., denoise=True)`: 2 N - 1 evaluations. Given
    `s_churn`, a step that begins at r in [s_min, s_max] first adds noise up to r (1 +
    min(s_churn / N, sqrt(2) - 1)), but not beyond the start of the path. From alpha = 0
    the step is DDIM's. The names are the paper's, whose sigma is r.
    """

    s_churn: Scalar | None = number(None)
    s_min: Scalar = number(0.0)
    s_max: Scalar = number(np.inf)
    s_noise: Scalar = number(1.0)

    points = 2
    calls = 2

    @property
    def draws(self):
        """Whether it adds noise of its own."""
        return self.s_churn is not None

    def start(self, term, here, there, y):
        """The clock of the highest noise level, which churn does not exceed."""
        return here

    def advance(self, term, here, there, y, state):
        """Two evaluations, one step."""
        if self.s_churn is not None:
            if here.clock.ndim:
                raise ValueError(
                    "churn raises one noise level, and on this path every coordinate "
                    "has its own. Use EDMHeun() without s_churn, or a stochasticity "
                    "with DPMSolverSDE()."
                )
            here, y = self._churn(term, here, y, state)
        x0, z = term.posterior_means(here, y)
        first = ddim(there, x0, z)
        z1 = term.posterior_means(there, first)[1]
        (a0, tau0), (a1, tau1) = (here.a, here.tau), (there.a, there.tau)
        # a1 (r1 - r0) (z1 - z) / 2 on top of DDIM, with r = tau / a
        width = tau1 - a1 * tau0 / jnp.where(a0 > 0, a0, 1)
        second = first + 0.5 * width * (z1 - z)
        return jnp.where(a0 > 0, second, first), None, state

    def _churn(self, term, here, y, top):
        a, tau = here.a, here.tau
        steps = len(term.brownian.ts)
        gamma = jnp.minimum(self.s_churn / steps, np.sqrt(2) - 1).astype(a.dtype)
        r = tau / jnp.where(a > 0, a, 1)
        inside = (a > 0) & (r >= self.s_min) & (r <= self.s_max)
        raised = r * (1 + jnp.where(inside, gamma, 0))
        ceiling = top.tau / jnp.where(top.a > 0, top.a, 1e-6)
        raised = jnp.maximum(jnp.minimum(raised, ceiling), r)
        noise = root(raised**2 - r**2) * self.s_noise
        point = y / jnp.where(a > 0, a, 1) + noise * term.normal()
        node = term.node(jnp.where(inside, jnp.log1p(1 / raised), here.clock))
        return node, jnp.where(inside, node.a * point, y).astype(y.dtype)
