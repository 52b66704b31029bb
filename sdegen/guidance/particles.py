"""Sampling a tilted distribution exp(r(x0)) p(x0) / Z by particles: exact in the limit.

Sequential Monte Carlo (Wu et al. 2023, "Practical and asymptotically exact conditional
sampling in diffusion models", algorithm 1): particles move by the guided ancestral step
q, which depends on r through a twist, and weights correct the error of q:

    psi_t(x) = exp(k_t r(x0_hat(x))),   k = 1 at the end                            (1)
    w_s = psi_s(x_s) p(x_s | x_t) / (psi_t(x_t) q(x_s | x_t)),    w_T = psi_T(x_T)  (2)

The product of the psi telescopes to exp(r) at the end. When the effective number 1 /
sum w^2 falls below a share of the particles, they are drawn anew in proportion to their
weights (systematic resampling). The mean weight estimates Z without bias. p is that of
the ancestral sampler on the grid: exact for many particles *and* steps.
"""

import operator
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..models.denoiser import AbstractDenoiser
from ..processes.path import AbstractPath, basis_of, check_sample
from ..sampling.ancestral import Transition, draws
from ..sampling.drive import check_sharding, constrain, sample_keys
from ..solvers.ddim import Variance
from ..solvers.grids import Adaptive, Grid, LogSNRGrid, check_grid, whole_steps
from ..typing import (
    PyTree,
    RandomKey,
    Scalar,
    ScalarLike,
    Seed,
    condition_arrays,
    float_array,
    is_traced,
    random_key,
)
from .classifier import rewarded
from .guidance import check_gaussian, noise_gain, off_noise, remaining_variance, spread


class Particles(eqx.Module):
    """Weighted samples of a tilted distribution.

    - `x`: the particles, (particles, ...).
    - `log_weights`: their exponentials sum to 1.
    - `log_evidence`: log Z, in nats.
    - `log_evidence_error`: its standard error, from the ancestors of the particles (Lee
      and Whiteley 2018, "Variance estimation in the particle filter", eq. 5; inf where
      all have one). A mode that no particle reached is in neither number.
    - `ess`: the effective number of particles at every time of the grid.
    - `resampled`: how often they were drawn anew.
    - `evaluations`: of the network on all particles, with a vector-Jacobian product.
    - `ok`: which particles are finite, (particles,); one that is not has no weight.
    """

    x: Float[Array, "particles ..."]
    log_weights: Float[Array, " particles"]
    log_evidence: Scalar
    log_evidence_error: Scalar
    ess: Float[Array, " times"]
    resampled: Int[Array, ""]
    evaluations: Int[Array, ""]
    ok: Array

    def mean(self, fn: Callable = lambda x: x) -> PyTree:
        """The weighted mean of fn(x), which maps the batch to arrays over it."""
        weights = jnp.exp(self.log_weights)

        def mean(a):  # a lost particle may be nan
            counts = (weights > 0).reshape(-1, *(1,) * (a.ndim - 1))
            return jnp.tensordot(weights, jnp.where(counts, a, 0), 1)

        return jax.tree.map(mean, fn(self.x))

    def draw(self, key: Seed, n: int) -> Float[Array, "n ..."]:
        """n samples of equal weight, in random order."""
        pick, order = jax.random.split(random_key(key))
        index = systematic(pick, self.log_weights, n)
        return self.x[jax.random.permutation(order, index)]


def sample_tilted(
    key: Seed,
    denoiser: AbstractDenoiser,
    reward: Callable,
    shape: tuple[int, ...],
    *,
    grid: Grid | Adaptive | Array | int | None = None,
    stochasticity: ScalarLike = 1.0,
    temper: Callable | None = None,
    variance: Variance | None = None,
    threshold: ScalarLike = 0.5,
    cond: PyTree = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Particles:
    """Weighted samples of p(x0) exp(r(x0)) / Z, with `shape[0]` particles.

    **Arguments:**
    - `key`: a random key; particle i draws from (key, i).
    - `denoiser`: any, on a path with Gaussian noise.
    - `reward`: (x0, cond) -> the r of each sample, (batch,), in nats, differentiable.
    - `shape`: (particles, ...).
    - `grid`: a grid such as `LogSNRGrid(100)`, an array of falling times, or a number
      of steps equal in log-SNR; 100.
    - `stochasticity`: DDIM's eta, above 0 and at most 1; 1.
    - `temper`: (path, t) -> k_t in (1), from 0 to 1; `share_temper()`.
    - `variance`: of what x0_hat leaves out, as `solvers.analytic_variance`; none.
    - `threshold`: the share of effective particles that calls for drawing anew; 0.5.
    - `cond`: the one condition of all particles, without a batch axis; none.
    - `sharding`: how to split the particle axis over devices; none.

    **Returns:** `Particles`.

    **Raises:** ValueError for noise that is not Gaussian, adaptive steps, one particle
    or a stochasticity of 0.
    """
    shape = tuple(map(operator.index, shape))
    if len(shape) < 2 or shape[0] < 2:
        raise ValueError(f"particles need (n, ...), two of them or more, got {shape}.")
    check_gaussian(denoiser.path)
    check_sample(denoiser.path, shape[1:])
    check_sharding(sharding, shape)
    grid = fixed_grid(grid, 100, denoiser.path, "sample_tilted")
    if not is_traced(stochasticity) and not 0 < float(stochasticity) <= 1:
        raise ValueError(
            "the stochasticity of particles is above 0 and at most 1, got "
            f"{float(stochasticity):g}: a step needs a density."
        )
    numbers = (float_array(stochasticity), float_array(threshold))
    own = (temper or share_temper(), variance, shape, sharding)
    cond = condition_arrays(cond)
    return _run(random_key(key), denoiser, reward, cond, grid, *numbers, *own)


def fixed_grid(grid, steps: int, path: AbstractPath, what: str):
    """`grid`, or one of so many steps of equal log-SNR; adaptive steps are refused."""
    if isinstance(grid, Adaptive):
        raise ValueError(
            f"{what} takes its steps on a fixed grid, such as LogSNRGrid({steps}): it "
            "needs their densities or noise levels."
        )
    if (count := whole_steps(steps if grid is None else grid, what)) is not None:
        return LogSNRGrid(count)
    return check_grid(grid, path)


def systematic(key: RandomKey, log_weights: Array, n: int) -> Int[Array, " n"]:
    """n indices with index i about n w_i times, from one uniform number."""
    total = jnp.cumsum(jax.nn.softmax(log_weights))
    points = (jnp.arange(n) + jax.random.uniform(key, (), total.dtype)) / n
    index = jnp.searchsorted(total / total[-1], points, side="right")
    return jnp.minimum(index, len(log_weights) - 1)


def share_temper(power: ScalarLike = 4.0, sigma_data: ScalarLike = 1.0) -> Callable:
    """A `temper`, k_t = (1 - Var[x0 | x_t] / s^2)^power, for `sample_tilted`.

    For Gaussian data 1 - Var / s^2 = alpha^2 s^2 / (alpha^2 s^2 + sigma^2).

    **Arguments:**
    - `power`: 4; larger for sharper rewards, 0 for k = 1.
    - `sigma_data`: s, the standard deviation of the data; 1.
    """
    return eqx.Partial(_share, float_array(power), float_array(sigma_data))


def _share(power, sigma_data, path: AbstractPath, t):
    alpha, sigma = path.level(t)
    known = (alpha * sigma_data) ** 2
    return (known / (known + sigma**2)) ** power


def gaussian_temper(std: ScalarLike, sigma_data: ScalarLike = 1.0) -> Callable:
    """A `temper`, k_t = std^2 / (std^2 + r_t^2), for a Gaussian log-likelihood.

    r_t^2 = s^2 sigma^2 / (alpha^2 s^2 + sigma^2): what is unknown of Gaussian data.

    **Arguments:**
    - `std`: the standard deviation of the measurement, in its units.
    - `sigma_data`: s, the standard deviation of the data; 1.
    """
    return eqx.Partial(_temper, float_array(std), float_array(sigma_data))


def _temper(std, sigma_data, path: AbstractPath, t):
    return std**2 / (std**2 + remaining_variance(*path.level(t), sigma_data))


@eqx.filter_jit
def _run(
    key, denoiser, reward, cond, grid, eta, threshold, temper, variance, shape, sharding
) -> Particles:
    path, n = denoiser.path, shape[0]
    ts = jnp.asarray(grid(path) if callable(grid) else grid)
    dtype, split = ts.dtype, lambda x: constrain(x, sharding)
    index, keys = split(jnp.arange(n)), sample_keys(key, n, sharding)
    cond = spread(cond, n)

    def look(x, t, last):  # means at x, log psi, and the shift of x0_hat it asks for
        means, value, slope = rewarded(denoiser, reward, t, x, cond)
        k = jnp.where(last, 1.0, temper(path, t))
        shift = k * noise_gain(path, off_noise(path, t), x) * slope
        return means, (k * value).astype(dtype), shift.astype(dtype)

    def noise(step):
        fold = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return draws(fold, shape[1:], path, dtype)

    def settle(x, log_weights, evidence):
        # without a weight a lost particle is drawn anew, and spoils no other
        finite = jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))
        good = finite & (log_weights < jnp.inf)  # false of nan
        log_weights = jnp.where(good, log_weights, -jnp.inf)
        total = jax.nn.logsumexp(log_weights)
        return log_weights - total, evidence + total

    def step(carry, now):
        (means, log_psi, shift), log_weights, evidence, roots, count = carry
        t, s, number, last = now
        low = jnp.log(threshold * n) > -jax.nn.logsumexp(2 * log_weights)
        fold = jax.random.fold_in(jax.random.fold_in(key, number), 2**31 - 1)
        chosen = jnp.where(low, systematic(fold, log_weights, n), index)
        taken = (means, log_psi, shift, roots)
        means, log_psi, shift, roots = jax.tree.map(lambda a: split(a[chosen]), taken)
        log_weights = jnp.where(low, -jnp.log(float(n)), log_weights)
        move = Transition(path, t, s, eta, variance)
        xi = noise(number)
        x = split(move(*means, xi) + (move.pull * shift).astype(dtype))
        # p and q have one variance: the ratio from the distance of their means alone.
        gap = move.pull * shift / move.fresh
        ratio = -jnp.sum((gap * (xi + gap / 2)).reshape(n, -1), axis=1)
        view = look(x, s, last)
        log_weights = log_weights + ratio.astype(dtype) + view[1] - log_psi
        log_weights, evidence = settle(view[0][0], log_weights, evidence)
        carry = (view, log_weights, evidence, roots, count + low)
        return carry, 1 / jnp.sum(jnp.exp(2 * log_weights))

    view = look(split(path.sigma(ts[0]) * noise(0)).astype(dtype), ts[0], len(ts) == 1)
    log_weights = view[1] - jnp.log(float(n))
    log_weights, evidence = settle(view[0][0], log_weights, jnp.zeros((), dtype))
    first = 1 / jnp.sum(jnp.exp(2 * log_weights))
    number = jnp.arange(1, len(ts))
    carry = (view, log_weights, evidence, index, jnp.zeros((), int))
    now = (ts[:-1], ts[1:], number, number == len(ts) - 1)
    carry, ess = jax.lax.scan(step, carry, now)
    ((x, _), _, _), log_weights, evidence, roots, count = carry
    error = _evidence_error(log_weights, roots, count)
    finite = jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))
    ess, ok = jnp.append(first, ess), finite & jnp.isfinite(evidence)
    own = (evidence, error, ess, count, jnp.asarray(len(ts)), ok)
    return Particles(basis_of(path).data(x), log_weights, *own)


def _evidence_error(log_weights, roots, count):
    """The relative standard error of Z, hence of log Z, from who descends from whom."""
    n = len(log_weights)
    families = jax.ops.segment_sum(jnp.exp(log_weights), roots, n)
    # The weight of pairs from different families, against what it would be by chance.
    pairs = (1 - jnp.sum(families**2)) * (n / (n - 1)) ** (count + 1)
    return jnp.where(pairs > 0, jnp.sqrt(jnp.maximum(1 - pairs, 0)), jnp.inf)
