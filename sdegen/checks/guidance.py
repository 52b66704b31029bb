"""What does a guided sampler sample? Three distributions, on data where all are known.

Guidance of weight w is meant to draw from the tilted distribution

    p(x0 | c)^(1 + w) p(x0)^(-w) / Z.                                               (1)

The guided flow and the guided SDE sample two others, because powers of the noised
densities are not the noised powers (Bradley and Nakkiran 2024, "Classifier-free
guidance is a predictor-corrector"). Particles sample (1), in the limit of many.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..data.mixture import Mixture
from ..guidance import Autoguided
from ..guidance.particles import sample_tilted
from ..processes.path import AbstractPath
from ..sampling.sample import sample
from ..solvers import DPMSolverSDE, Variance
from ..solvers.grids import LogSNRGrid
from ..typing import Seed, random_key

_NODES = 20_001


def tilt_report(
    key: Seed,
    conditional: Mixture,
    unconditional: Mixture,
    weight: float,
    path: AbstractPath,
    *,
    particles: Sequence[int] = (100, 1000, 10_000),
    samples: int = 10_000,
    steps: int = 200,
) -> list[dict]:
    """How far guided samplers and particles are from (1), as a table.

    **Arguments:**
    - `key`: a random key.
    - `conditional`, `unconditional`: mixtures on the line, p(x0 | c) and p(x0).
    - `weight`: w in (1).
    - `path`: the process of all samplers.
    - `particles`: the numbers of particles to try; 100, 1000 and 10 000.
    - `samples`: of the guided flow and of the guided SDE; 10 000.
    - `steps`: of every sampler; 200.

    **Returns:** a list of dictionaries, for `sdegen.runs.recorder.table`:
    `distribution`, the name of the row; `mean`, `std`; `W1`, the distance to (1) in
    units of x ("drawn exactly" is its floor for as many samples); `log Z` in nats and
    its standard error, NaN where there is none; `evaluations`.

    **Raises:** a ValueError for mixtures that are not on the line, and where (1) has no
    finite mass.
    """
    for mixture in (conditional, unconditional):
        if mixture.means.shape[1] != 1:
            raise ValueError(
                "tilt_report integrates densities on the line, got a mixture in "
                f"{mixture.means.shape[1]} dimensions."
            )
    if not np.isfinite(weight):
        raise ValueError(f"the guidance weight must be finite, got {weight}.")
    x, cdf, log_z = _tilted(conditional, unconditional, weight)
    strong, weak = (each.denoiser(path) for each in (conditional, unconditional))
    guided, shape = Autoguided(strong, weak, weight), (samples, 1)
    grid = LogSNRGrid(steps)(path)
    noisy = {"solver": DPMSolverSDE(), "stochasticity": 1.0}
    keys = jax.random.split(random_key(key), 4 + len(particles))
    variance = _left_out(keys[3], conditional, strong, grid)
    u = np.asarray(jax.random.uniform(keys[0], (samples,)))
    exact = _row("tilted", (x[1:] + x[:-1]) / 2, x, cdf, np.diff(cdf))
    exact |= {"W1": 0.0, "log Z": log_z, "+-": 0.0}
    rows = [exact, _row("drawn exactly", np.interp(u, cdf, x), x, cdf)]
    for name, own, options in (("flow", keys[1], {}), ("SDE", keys[2], noisy)):
        out = sample(own, guided, shape, grid=grid, **options)
        row = _row(f"guided {name}", out.x[:, 0], x, cdf)
        rows.append(row | {"evaluations": int(out.evaluations)})

    def reward(x0, cond):
        return weight * (_log_prob(conditional, x0) - _log_prob(unconditional, x0))

    for n, own in zip(particles, keys[4:], strict=True):
        size = (int(n), 1)
        out = sample_tilted(own, strong, reward, size, grid=grid, variance=variance)
        found = {
            "log Z": float(out.log_evidence),
            "+-": float(out.log_evidence_error),
            "evaluations": int(out.evaluations),
        }
        weights = np.exp(np.asarray(out.log_weights))
        rows.append(_row(f"{n} particles", out.x[:, 0], x, cdf, weights) | found)
    return rows


def _left_out(key, mixture, denoiser, ts):
    """The mean variance of x0 given x_t at every time: what the denoiser misses."""
    path, (pick, noise) = denoiser.path, jax.random.split(key)
    x0 = mixture.sample(pick, 100_000)
    z = jax.random.normal(noise, x0.shape, x0.dtype)

    def missed(t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        error = x0 - denoiser(t, alpha * x0 + sigma * z)
        return jnp.log1p(alpha / sigma), jnp.mean(error**2)

    return Variance(*jax.lax.map(missed, ts))


def _log_prob(mixture, x):
    """log p of clean data (n, 1)."""
    return jax.vmap(lambda x: jax.nn.logsumexp(mixture.joint(x, 1.0, 0.0)[0]))(x)


def _tilted(conditional, unconditional, weight):
    """(x, distribution function, log Z) of (1), by the trapezoidal rule."""
    reach = 12 * float(conditional.stds.max()) + float(jnp.abs(conditional.means).max())
    x = np.linspace(-reach, reach, _NODES)
    column, both = jnp.asarray(x)[:, None], (conditional, unconditional)
    logs = [np.asarray(_log_prob(mixture, column)) for mixture in both]
    log_density = (1 + weight) * logs[0] - weight * logs[1]
    top = log_density.max()
    density = np.exp(log_density - top)
    mass = (density[1:] + density[:-1]) / 2 * np.diff(x)
    if not density[[0, -1]].max() < 1e-6 * density.max():
        raise ValueError(
            f"the tilted distribution of weight {weight:g} has no finite mass here: "
            "the unconditional density falls faster than the conditional one."
        )
    cdf = np.concatenate([[0.0], np.cumsum(mass)])
    return x, cdf / cdf[-1], float(np.log(cdf[-1]) + top)


def _row(name, found, x, cdf, weights=None):
    found = np.asarray(found, np.float64)
    weights = np.ones(len(found)) / len(found) if weights is None else weights
    mean = float(weights @ found)
    std = float(np.sqrt(weights @ (found - mean) ** 2))
    order = np.argsort(found)
    total = np.concatenate([[0.0], np.cumsum(weights[order])])
    own = total[np.searchsorted(found[order], x, side="right")]
    distance = float(np.trapezoid(np.abs(own - cdf), x))
    row = {"distribution": name, "mean": mean, "std": std, "W1": distance}
    return row | {"log Z": float("nan"), "+-": float("nan"), "evaluations": 0}
