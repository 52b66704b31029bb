"""Do the flow and the reverse SDE bring known data back, and where do they start?

Both start from the exact distribution at the noise end and use the exact score, so they
must end in that of the data at t_min:

    F_min(x(t_min)) = F_max(x(t_max)) = q    for the flow, for every quantile q,   (1)
    sup_x |F_n(x) - F_min(x)| ~ n^(-1/2)     for n samples of the reverse SDE.     (2)

(1) holds in 1-D for any flow that obeys the continuity equation. (2) is the statistic
of Kolmogorov and Smirnov, in units of the largest standard error of an empirical
distribution function, 1 / (2 sqrt(n)). The bias of Euler-Maruyama is allowed for.

A sampler starts from sigma_T z alone. x_T still holds alpha_T x0, and for data of unit
standard deviation

    signal = alpha_T / sigma_T                                                     (3)

is an upper bound of W2(x_T, sigma_T z) / sigma_T.
"""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, ArrayLike

from ..processes.path import AbstractPath
from ..processes.reverse import clock_of_time, probability_flow, reverse
from ..processes.sde import AbstractSDE
from ..sampling.simulate import simulate
from ..typing import RandomKey
from .report import Row, measured, skipped
from .tables import Case, Clock, Window
from .test_data import PROBES, PathScore, data

FLOW_BAR = 2e-3  # probability; Heun's error is below 2e-4 for every built-in process
KS_BAR = 5.0  # a p-value of 4e-6
KS_BIAS = 0.01  # Euler-Maruyama's, in probability
_STEPS = 500  # even in log-SNR, and as many even in the library's clock
_RATIO = 1e-2
_SIGNAL = 0.05  # allowed at t_max
FLOW, SDE = "flow", "reverse SDE"
WHAT = {
    FLOW: "quantiles of the data come back along probability_flow",
    SDE: "the distribution of the data comes back by reverse (KS)",
}


def ks_row(
    part: str, name: str, what: str, cdf: ArrayLike, bias: float = KS_BIAS
) -> Row:
    """Equation (2), in standard errors, from the exact F at each sample."""
    cdf = np.sort(np.asarray(cdf))
    n = len(cdf)
    above = np.arange(1, n + 1) / n - cdf
    found = np.maximum(above.max(), (1 / n - above).max()) * 2 * np.sqrt(n)
    found = found if np.isfinite(cdf).all() else np.nan
    return measured(part, name, what, found, KS_BAR + bias * 2 * np.sqrt(n), "SE")


def return_rows(
    key: RandomKey,
    sde: AbstractSDE,
    score: Callable,
    starts: tuple[Array, Array],
    cdf: Callable,
    grid: Array | int,
    remark: str = "",
    flow_bar: float = FLOW_BAR,
) -> list[Row]:
    """(1) and (2), from `starts` at the noise end to `cdf` at t_min."""
    quantiles, draws = starts
    solved = simulate(key, probability_flow(sde, score), quantiles, grid=grid)
    error = np.max(np.abs(np.asarray(cdf(solved.x[:, 0])) - PROBES))
    row = measured("reversal", FLOW, WHAT[FLOW], error, flow_bar, remark=remark)
    solved = simulate(key, reverse(sde, score), draws, grid=grid)
    return [row, ks_row("reversal", SDE, WHAT[SDE], cdf(solved.x[:, 0]))]


def terminal_rows(clock: Clock, path: AbstractPath) -> list[Row]:
    """Equation (3), with W2 as a remark where the noise is Gaussian."""
    remark = ""
    if path.noise.gaussian:
        distance = float(_w2(data().standardised(), *clock.scales(clock.high)))
        remark = f"W2(x_T, sigma_T z) = {distance:.2g} sigma_T for 1-D data of unit std"
    if not clock.ratio <= _SIGNAL:
        remark += "\nx_T is not the pure noise of a sampler: raise t_max or the noise"
    what = "signal left at t_max, alpha_T / sigma_T"
    return [measured("terminal", "noise end", what, clock.ratio, _SIGNAL, "", remark)]


@eqx.filter_jit
def _w2(data, alpha, sigma):
    q = jnp.asarray((np.arange(4000) + 0.5) / 4000)
    gap = data.quantile(q, alpha, sigma) / sigma - norm.ppf(q)
    return jnp.sqrt(jnp.mean(gap**2))


@eqx.filter_jit
def _cdf(alpha, sigma, x):
    return data().cdf(x, alpha, sigma)


@eqx.filter_jit
def _starts(key, alpha, sigma, samples):
    x0 = data().sample(key, samples, (1,))
    z = jax.random.normal(jax.random.fold_in(key, 1), x0.shape)
    quantiles = data().quantile(jnp.asarray(PROBES), alpha, sigma)
    return quantiles[:, None], alpha * x0 + sigma * z


def path_reversal(case: Case) -> list[Row]:
    """(1) and (2) where p_t is known from alpha and sigma."""
    clock = case.clock
    end = clock.end(_RATIO)
    if not clock.low < end:
        why = "alpha / sigma is below 0.01 at all times: no data to bring back"
        return [skipped("reversal", name, WHAT[name], why) for name in WHAT]
    remark = ""
    if end < clock.high:
        remark = f"from t = {end:.4g}, where alpha/sigma = {_RATIO:g}, not from t_max"
    starts = _starts(case.key, *clock.scales(end), case.samples)
    process = Window(case.process, clock.low, end)
    score, grid = PathScore(case.process), _grid(clock, process)
    cdf = functools.partial(_cdf, *clock.scales(clock.low))
    return return_rows(case.key, process, score, starts, cdf, grid, remark)


def forward_row(case: Case) -> Row:
    """Paths simulated forward against alpha x0 + sigma z; (2) again."""
    clock = case.clock
    end = clock.end(_RATIO)
    _, x = _starts(case.key, *clock.scales(clock.low), case.samples)
    ts = np.unique(np.append(clock.even(2 * _STEPS, _RATIO), [clock.low, end]))
    solved = simulate(case.key, case.sde, x, grid=jnp.asarray(ts))
    what = f"simulated x_t and alpha x0 + sigma z, t = {end:.3g} (KS)"
    cdf = _cdf(*clock.scales(end), solved.x[:, 0])
    return ks_row("weak form", "forward", what, cdf)


def _grid(clock, process):
    """Rising points of the clock of `reverse`: half even in it, half in log-SNR."""
    end = float(process.t_max)
    level = np.linspace(clock.fall[0], np.interp(end, clock.ts, clock.fall), _STEPS + 1)
    ts = jnp.clip(np.interp(level, clock.fall, clock.ts), clock.low, end)
    by_noise = jax.vmap(lambda t: clock_of_time(process, t))(ts)
    by_clock = (np.arange(_STEPS) + 0.5) / _STEPS
    points = np.sort(np.concatenate([by_noise, by_clock]))
    points[0], points[-1] = 0.0, 1.0
    # A flat stretch of log-SNR would give a point twice; steps have to rise.
    points += 1e-9 * np.arange(len(points))
    return jnp.asarray(points / points[-1])
