"""Exact answers: data laws whose marginals under every path have closed forms.

Under x_t = alpha x0 + sigma z a Gaussian mixture stays one: component k has mean alpha
mu_k and variance alpha^2 s_k^2 + sigma^2. Everything here is written from that one
sentence, independently of the library, in 1-D with the distribution function too.
"""

import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

import sdegen
from sdegen.models.denoiser import PosteriorMean
from sdegen.typing import is_traced


class Mixture1D:
    """A mixture of Gaussians on the line: weights, means, standard deviations."""

    def __init__(self, weights, means, stds):
        self.w, self.mu, self.s = (np.asarray(v, float) for v in (weights, means, stds))

    def moments(self, alpha, sigma):
        """Means and standard deviations of the components of x_t."""
        return alpha * self.mu, jnp.sqrt((alpha * self.s) ** 2 + sigma**2)

    def pdf(self, x, alpha=1.0, sigma=0.0):
        m, s = self.moments(alpha, sigma)
        return jnp.sum(self.w * norm.pdf(x[..., None], m, s), -1)

    def cdf(self, x, alpha=1.0, sigma=0.0):
        m, s = self.moments(alpha, sigma)
        return jnp.sum(self.w * norm.cdf(x[..., None], m, s), -1)

    def score(self, x, alpha=1.0, sigma=0.0):
        m, s = self.moments(alpha, sigma)
        log_joint = jnp.log(self.w) + norm.logpdf(x[..., None], m, s)
        return jnp.sum(jax.nn.softmax(log_joint, -1) * (m - x[..., None]) / s**2, -1)

    def denoise(self, x, alpha, sigma):
        """E[x0 given x_t = x]."""
        m, s = self.moments(alpha, sigma)
        log_joint = jnp.log(self.w) + norm.logpdf(x[..., None], m, s)
        posterior = self.mu + alpha * self.s**2 / s**2 * (x[..., None] - m)
        return jnp.sum(jax.nn.softmax(log_joint, -1) * posterior, -1)

    def quantile(self, q, alpha=1.0, sigma=0.0):
        """The x with cdf(x) = q, by bisection."""
        lo, hi = jnp.full(np.shape(q), -1e3), jnp.full(np.shape(q), 1e3)
        for _ in range(80):
            mid = (lo + hi) / 2
            below = self.cdf(mid, alpha, sigma) < q
            lo, hi = jnp.where(below, mid, lo), jnp.where(below, hi, mid)
        return (lo + hi) / 2

    def sample(self, key, n):
        """n draws of x0."""
        pick, noise = jax.random.split(key)
        k = jax.random.categorical(pick, jnp.log(self.w), shape=(n,))
        return jnp.asarray(self.mu)[k] + jnp.asarray(self.s)[k] * jax.random.normal(
            noise, (n,)
        )

    @property
    def mean(self):
        return float(self.w @ self.mu)

    @property
    def var(self):
        return float(self.w @ (self.mu**2 + self.s**2) - self.mean**2)

    def denoiser(self, path):
        """The exact denoiser on `path`, for x of shape (batch, 1), dtype kept."""
        return PosteriorMean(functools.partial(_denoise, self, path), path)


def _denoise(mixture, path, t, x, cond):
    alpha, sigma = path.alpha(t), path.sigma(t)
    if jnp.ndim(t):
        alpha, sigma = (jax.vmap(f)(t)[:, None, None] for f in (path.alpha, path.sigma))
    return mixture.denoise(x, alpha, sigma).astype(x.dtype)


G1 = Mixture1D([0.3, 0.7], [-1.5, 1.0], [0.3, 0.5])
"""Skewed on purpose: a symmetric law cannot see a sign error."""
G2 = Mixture1D([1.0], [1.0], [0.5])
"""A Gaussian: N(1, 0.25)."""
PROBES = np.array([0.05, 0.12, 0.20, 0.42, 0.60, 0.80, 0.95])
"""Quantile probes; never 0.30, the separatrix of G1."""


def finals(module, base):
    """Every final subclass of `noise` in `module`, default-constructible, by name."""
    found = {
        name: cls
        for name, cls in vars(module).items()
        if inspect.isclass(cls)
        and issubclass(cls, base)
        and not inspect.isabstract(cls)
    }
    return dict(sorted(found.items()))


PROCESSES = finals(sdegen, sdegen.AbstractLinearSDE)
"""Every linear process that the package exports, LinearSDE included."""


_MADE = {}


def process(name):
    """The default object of a process, made once in float64."""
    if name not in _MADE:
        with jax.enable_x64(True):  # also when a test in float32 asks first
            made = PROCESSES[name]()
        if is_traced(made):  # inside of a jit: it holds no numbers
            return made
        _MADE[name] = made
    return _MADE[name]


def as_float32(tree):
    """The same object with float32 numbers."""
    return jax.tree.map(
        lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a, tree
    )
