"""DDIM: the first-order step of every process, with any share of fresh noise."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..processes.prediction import PosteriorMeans
from ..typing import PyTree, float_array, is_traced
from .semilinear import ddim, decay, root
from .solver import AbstractSemilinearSolver


class Variance(eqx.Module):
    """The variance of x0 given x_t, averaged over coordinates, on the clock c."""

    clock: Float[Array, " times"]
    values: Float[Array, " times"]

    def __call__(self, c):
        """The variance at the clock c, by linear interpolation."""
        return jnp.interp(c, self.clock, self.values)


def analytic_variance(
    denoiser: PosteriorMeans,
    samples: Float[Array, "times batch ..."],
    times: Float[Array, " times"],
    *,
    cond: PyTree = None,
    bound: float | None = None,
) -> Variance:
    """(sigma/alpha)^2 (1 - E |z_hat|^2 / d) at `times`, from `samples` of x_t at each.

    Bao et al. 2022, "Analytic-DPM", eq. 9: exact for the exact denoiser. Clipped to
    [0, (sigma/alpha)^2], and to `bound`, an upper bound of the variance of x0 if one is
    known (((b - a) / 2)^2 for data in [a, b]), which large noise needs: there the
    estimate is a small difference times (sigma/alpha)^2. `times` should hold the grid
    that will be sampled on.
    """
    path = denoiser.path
    if jax.eval_shape(path.scales, float_array(times[0]))[0].ndim:
        raise ValueError(
            "analytic_variance is one number for all coordinates, and on this path "
            "every coordinate has its own noise level. Use DDIM() without it."
        )
    if bound is None and not is_traced(path) and float(path.alpha(times[0])) == 0:
        raise ValueError(
            "analytic_variance needs bound=, an upper bound of the variance of x0, on "
            "a path that reaches alpha = 0."
        )
    clock, values = [], []
    for t, x in zip(float_array(times), samples, strict=True):
        alpha, sigma = path.alpha(t), path.sigma(t)
        share = jnp.mean(denoiser.eps(t, x, cond) ** 2)
        # Where alpha is 0 nothing is known: the bound, or the largest finite number.
        top = jnp.finfo(x.dtype).max if bound is None else bound
        ceiling = jnp.where(alpha > 0, (sigma / jnp.maximum(alpha, 1e-30)) ** 2, top)
        values.append(jnp.clip(ceiling * (1 - share), 0, jnp.minimum(ceiling, top)))
        clock.append(jnp.log1p(alpha / sigma))
    order = jnp.argsort(jnp.stack(clock))
    return Variance(jnp.stack(clock)[order], jnp.stack(values)[order])


class DDIM(AbstractSemilinearSolver):
    """x_s = alpha_s x0_hat + sqrt(sigma_s^2 - v) z_hat + sqrt(v) noise, order 1.

    Song, Meng and Ermon 2021, "Denoising diffusion implicit models", eq. 12, for any
    path: v = eta^2 sigma_s^2 (1 - exp(-2h)), where the eta of the paper is the
    `stochasticity` of `sample`, 0 to 1. At 0 it is the flow, and Euler's method in
    sigma / alpha; at 1 on the grid of `DDPM` it is the ancestral sampler with the
    posterior variance. Other solvers agree at 0 and 1, and between for small steps.

    `variance` adds what x0_hat leaves out, the optimal reverse variance of Bao et al.
    2022 (`analytic_variance`): (alpha_s - alpha_t k)^2 Var[x0], k = sqrt(sigma_s^2 - v)
    / sigma_t. It then draws noise at every stochasticity.
    """

    variance: Variance | None = None

    family = 1.0

    @property
    def draws(self):
        """Whether it adds noise even to the flow."""
        return self.variance is not None

    def advance(self, term, here, there, y, state):
        """One evaluation, one step."""
        x0, z = term.posterior_means(here, y)
        if term.stochasticity is None and self.variance is None:
            return ddim(there, x0, z), None, None
        (a0, tau0), (a1, tau1) = (here.a, here.tau), (there.a, there.tau)
        shrink, gain = decay(here, there)
        eta = 0.0 if term.stochasticity is None else term.stochasticity
        fresh = eta**2 * gain * (1 + shrink)  # v / sigma_s^2
        keep = root(1 - fresh)
        v = tau1**2 * fresh
        if self.variance is not None:
            # alpha and sigma of the path are a and tau times the same scale, which
            # cancels in x0's variance.
            v = v + (a1 - a0 * keep * tau1 / tau0) ** 2 * self.variance(here.clock)
        noise = root(v) * term.normal()
        return a1 * x0 + tau1 * keep * z + noise.astype(y.dtype), None, None
