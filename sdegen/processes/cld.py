"""Critically damped Langevin diffusion, in closed form.

With M the mass and Gamma = 2 sqrt(M) its critical damping (Dockhorn et al. 2022, eq. 5)

    dx = beta v / M dt,    dv = -beta (x + Gamma v / M) dt + sqrt(2 Gamma beta) dw (1)

In the time s = int beta / sqrt(M), with p = v / sqrt(M), it is dx = p ds, dp = -(x + 2
p) ds + 2 dw, with the transition E and noise of covariance Q = I - E E^T from s = 0:

    E = exp(-s) [[1 + s, s], [-s, 1 - s]]                                          (2)
    Q_xx = 1 - exp(-2s) (1 + 2s + 2s^2) = 4 int_0^s r^2 exp(-2r) dr,
    Q_xp = 2 s^2 exp(-2s),    Q_pp = 1 - exp(-2s) (1 - 2s + 2s^2)                  (3)

From p_0 ~ N(0, gamma), a = E e_x and S = Q + gamma e e^T with e = E e_p:

    det S = det Q + gamma (Q_pp e_x^2 - 2 Q_xp e_x e_p + Q_xx e_p^2)               (4)
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ..typing import Scalar, float_array, is_traced, number
from .momentum import AbstractBlockSDE
from .noise import AbstractNoise, Gaussian

_NEAR = 0.5  # below it the closed form of Q_xx cancels, and its integral is taken
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(10)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


class CLD(AbstractBlockSDE):
    """Critically damped Langevin diffusion: only the velocity is noised, equation (1).

    Dockhorn et al. 2022, "Score-based generative modeling with critically-damped
    Langevin diffusion", with their numbers. `Augmented` samples x and v.

    **Arguments:**
    - `beta`, `slope`: beta(t) = beta + slope t, defaults 4 and 0.
    - `inverse_mass`: 1 / M, default 4.
    - `gamma`: the variance of the first velocities in units of M, default 0.04.
    """

    beta: Scalar = number(4.0)
    slope: Scalar = number(0.0)
    inverse_mass: Scalar = number(4.0)
    gamma: Scalar = number(0.04)
    t_min: Scalar = number(1e-3)
    t_max: Scalar = number(1.0)
    noise: AbstractNoise = eqx.field(default_factory=Gaussian)

    def _beta(self, t):
        return self.beta + self.slope * float_array(t)

    def matrix(self, t):
        """beta [[0, 1 / M], [-1, -Gamma / M]]."""
        m = self.inverse_mass
        rows = [[jnp.zeros_like(m), m], [-jnp.ones_like(m), -2 * jnp.sqrt(m)]]
        return self._beta(t) * jnp.array(rows)

    def noise_scale(self, t):
        """(0, sqrt(2 Gamma beta))."""
        g = jnp.sqrt(4 * self._beta(t) / jnp.sqrt(self.inverse_mass))
        return jnp.stack([jnp.zeros_like(g), g])

    def moments(self, t):
        """a and L of (x, v), equations (2) to (4)."""
        t, root = float_array(t), jnp.sqrt(self.inverse_mass)
        s = root * t * (self.beta + 0.5 * self.slope * t)
        decay = jnp.exp(-s)
        xx, xp, pp = _noise(s)
        ex, ep = decay * s, decay * (1 - s)
        det = xx * pp - xp**2
        det = det + self.gamma * (pp * ex**2 - 2 * xp * ex * ep + xx * ep**2)
        xx, xp = xx + self.gamma * ex**2, xp + self.gamma * ex * ep
        first, zero = jnp.sqrt(xx), jnp.zeros_like(s)
        rows = [[first, zero], [xp / first / root, jnp.sqrt(det / xx) / root]]
        a = jnp.stack([decay * (1 + s), -decay * s / root])
        return a, jnp.array(rows)

    def __check_init__(self):
        rules = {
            "beta > 0": self.beta,
            "inverse_mass > 0": self.inverse_mass,
            "gamma >= 0, the variance of the first velocities": self.gamma,
            "beta + slope t > 0 up to t_max": self.beta + self.slope * self.t_max,
        }
        for rule, value in rules.items():
            if is_traced(value):
                continue
            if not (float(value) > 0 or (float(value) == 0 and ">=" in rule)):
                raise ValueError(f"CLD needs {rule}, got {float(value):g}.")


def _noise(s):
    """(Q_xx, Q_xp, Q_pp), equation (3)."""
    y, decay = 2 * s, jnp.exp(-2 * s)
    near = jnp.minimum(s, _NEAR)
    r, weights = jnp.asarray(_NODES, s.dtype), jnp.asarray(_WEIGHTS, s.dtype)
    inside = 4 * near**3 * jnp.sum(weights * r**2 * jnp.exp(-2 * near * r))
    closed = 1 - decay * (1 + y + y**2 / 2)
    xx = jnp.where(s < _NEAR, inside, closed)
    return xx, decay * y**2 / 2, -jnp.expm1(-y) + y * (1 - s) * decay
