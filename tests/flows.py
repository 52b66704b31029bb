"""Flows with exact denoisers: what the tests of samplers and solvers share."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from oracle import G1, PROBES, Mixture1D, process

import sdegen
from sdegen.models.denoiser import PosteriorMean

KEY = jax.random.key(0)


class ExactMean(eqx.Module):
    """The posterior mean of a mixture under a path, moved by `shift`; counts traces."""

    path: sdegen.AbstractPath
    w: jax.Array
    mu: jax.Array
    s: jax.Array
    shift: jax.Array = eqx.field(default=0.0, converter=jnp.asarray)
    traces: list | None = eqx.field(default=None, static=True)

    moments, denoise = Mixture1D.moments, Mixture1D.denoise

    def __call__(self, t, x, cond):
        if self.traces is not None:
            self.traces.append(t)
        mean = self.denoise(x, *scales(self.path, t)) + self.shift
        return mean.astype(x.dtype)


def exact(path, mixture=G1, **options):
    """The exact denoiser of a path or of a process by name; its numbers are leaves."""
    path = process(path) if isinstance(path, str) else path
    law = (jnp.asarray(a) for a in (mixture.w, mixture.mu, mixture.s))
    return PosteriorMean(ExactMean(path, *law, **options), path)


def scales(path, t):
    return path.alpha(t), path.sigma(t)


def exact_quantiles(name, t):
    """Where the probes of the data are at time t, (7, 1)."""
    return _quantiles(name, float(t))


@functools.cache
def _quantiles(name, t):
    return G1.quantile(PROBES, *scales(process(name), t))[:, None]


def flow(name, **options):
    """The flow of G1 from the exact quantiles of x_{t_max} (or of the first time)."""
    path, grid, mixture = process(name), options.get("grid"), options.pop("data", G1)
    first = grid[0] if isinstance(grid, jax.Array | np.ndarray) else path.t_max
    start = options.pop("start", exact_quantiles(name, first))
    denoiser = exact(name, mixture)
    return sdegen.sample(KEY, denoiser, start.shape, start=start, **options)


def draws(path, n, seed=1):
    """`n` independent draws of x_{t_max}, (n, 1)."""
    data, noise = jax.random.split(jax.random.key(seed))
    alpha, sigma = scales(path, path.t_max)
    return (alpha * G1.sample(data, n) + sigma * jax.random.normal(noise, (n,)))[
        :, None
    ]


def has_the_law_of_x(x, path, t, bias=0.0, note=""):
    """Mean, variance and the whole distribution of draws of x_t, in standard errors."""
    alpha, sigma = scales(path, t)
    mean, var = alpha * G1.mean, alpha**2 * G1.var + sigma**2
    x = np.asarray(x, np.float64)[:, 0]
    mean_error = np.sqrt(var / len(x))
    var_error = np.sqrt((np.mean((x - mean) ** 4) - var**2) / len(x))
    ks = scipy.stats.kstest(np.asarray(G1.cdf(x, alpha, sigma)), "uniform")
    print(
        f"{note} mean {x.mean():.4f} (exact {mean:.4f}, bar {5 * mean_error:.4f}), "
        f"variance {x.var():.4f} (exact {var:.4f}, bar {5 * var_error:.4f}), "
        f"KS {ks.statistic:.4f}, p = {ks.pvalue:.2g}"
    )
    assert abs(x.mean() - mean) < 5 * mean_error + bias
    assert abs(x.var() - var) < 5 * var_error + bias
    assert ks.pvalue > 1e-6 or ks.statistic < bias  # 5 standard errors


def vp_time(tau):
    """VP's time of a flow time: B(t) = log(1 + (sigma/alpha)^2), a quadratic in t."""
    beta_min, slope = 0.1, 19.9
    b = np.log1p((tau / (1 - tau)) ** 2)
    return (np.sqrt(beta_min**2 + 2 * slope * b) - beta_min) / slope


TIME = {
    "VP": vp_time,
    "EDM": lambda tau: tau / (1 - tau),
    "RectifiedFlow": lambda tau: tau,
}
"""The time of a flow time sigma / (alpha + sigma), in closed form."""


def grids(name, steps):
    """Falling times over the whole path, by what they are equal steps of."""
    low, high = float(process(name).t_min), float(process(name).t_max)
    tau = [float(process(name).flow_time(t)) for t in (high, low)]
    log_ratio = [
        min(np.log(v / (1 - v)), np.log(1e3)) for v in np.clip(tau, 0, 1 - 1e-9)
    ]
    found = {
        "t": np.linspace(high, low, steps + 1),
        "flow time": TIME[name](np.linspace(*tau, steps + 1)[1:-1]),
        "log-SNR": TIME[name](1 / (1 + np.exp(-np.linspace(*log_ratio, steps + 1)))),
    }
    if name == "EDM":  # its time is the noise level: nobody takes equal steps of it
        found["t"] = np.linspace(high ** (1 / 7), low ** (1 / 7), steps + 1) ** 7
    for label, ts in found.items():
        inside = ts if label == "flow time" else ts[1:-1]
        yield label, jnp.asarray([high, *inside, low])


def ddim(path, ts, x):
    """x_s = alpha_s x0_hat + sigma_s z_hat (Song et al. 2021), in a Python loop."""
    for t, s in zip(ts[:-1], ts[1:], strict=True):
        alpha, sigma = scales(path, t)
        x0 = G1.denoise(x, alpha, sigma)
        z = (x - alpha * x0) / sigma
        alpha, sigma = scales(path, s)
        x = alpha * x0 + sigma * z
    return x
