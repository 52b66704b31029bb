"""Bits per dimension of images with integer values.

An integer k of `levels` is the bin [low + w k, low + w (k + 1)), w = (high - low) /
levels, of the model's continuous data v, and x at t_min is alpha v + sigma z. By
default k is in the middle of its bin after the scaling of `fit`, k / 127.5 - 1. With p
the model's density at t_min and D its denoiser there,

    P(k) = int_bin p(v) dv,    p(v) = int p(x) p(v | x) dx,                        (1)
    log P(k) >= E log mean_j exp(log p(x_j) + c_j) + d log w,                      (2)
    c_j = log r(z_j - z_hat_j) - log r(z_j) + d log alpha                          (3)

over draws j of v in the bin and of the noise z, with density r (importance weights:
Burda et al. 2016, eq. 8; uniform dequantisation: Theis et al. 2016, eq. 4). (3) is log
p(v | x) - log q(x | v) for p(v | x) = D(x) + (sigma / alpha) times noise: the step from
t_min to data (Song et al. 2021, "Maximum likelihood training of score-based diffusion
models", section 5). Bits per dimension are -log P / (d log 2).
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from ..losses.per_sample import sample_keys
from ..models.denoiser import AbstractDenoiser
from ..models.model import AbstractModel, conditions
from ..processes.path import basis_of
from ..solvers.semilinear import root
from ..typing import (
    PyTree,
    ScalarLike,
    Seed,
    float_array,
    is_traced,
    is_whole,
    random_key,
)
from .log_likelihood import log_likelihood, student


def dequantise(
    key: Seed,
    images: Shaped[Array, "batch ..."] | np.ndarray,
    *,
    levels: int = 256,
    low: ScalarLike | None = None,
    high: ScalarLike | None = None,
) -> Float[Array, "batch ..."]:
    """Integers 0 to levels - 1 as uniform draws from their bins in [low, high].

    Train on a fresh draw in every step: `bits_per_dim` integrates over these bins.

    **Arguments:**
    - `key`: a random key; draw i depends on (key, i).
    - `images`: whole numbers in any dtype, (batch, ...).
    - `levels`: the number of values of a pixel; 256.
    - `low`, `high`: where the first bin begins and the last one ends; by default 1 /
      (levels - 1) outside [-1, 1], so that 0 and levels - 1 in the middle of their bins
      are the -1 and 1 of `fit`.

    **Returns:** data in [low, high], (batch, ...).
    """
    images = jnp.asarray(images)
    low, high = _range(levels, low, high)
    dtype = jnp.result_type(float)
    keys = sample_keys(random_key(key), jnp.arange(len(images)))
    inside = jax.vmap(lambda k: jax.random.uniform(k, images.shape[1:], dtype))(keys)
    return low + (high - low) / levels * (images + inside)


class BitsPerDim(eqx.Module):
    """Bits per dimension by (2), one per image: on average upper bounds.

    `standard_error` is over draws, widened by Student's t, or for one draw over probes,
    blind to the dequantisation; nan where neither can tell. `evaluations` are those of
    the whole batch.
    """

    value: Float[Array, " batch"]
    standard_error: Float[Array, " batch"]
    solver_error: Float[Array, " batch"]
    evaluations: Int[Array, ""]
    ok: Array

    @property
    def mean_and_error(self) -> tuple[float, float]:
        """The mean over the images, and its standard error as that of a sample."""
        value = np.asarray(self.value, np.float64)
        bar = value.std(ddof=1) / np.sqrt(len(value)) if len(value) > 1 else np.nan
        return float(value.mean()), float(bar)


def bits_per_dim(
    model: AbstractModel,
    images: Shaped[Array, "batch ..."] | np.ndarray,
    *,
    key: Seed,
    levels: int = 256,
    low: float | None = None,
    high: float | None = None,
    draws: int = 1,
    correct: bool = True,
    cond: PyTree = None,
    **options,
) -> BitsPerDim:
    """Bits per dimension of integer images, equation (2).

    **Arguments:**
    - `model`: any that `log_likelihood` takes.
    - `images`: integers from 0 to `levels` - 1, (batch, ...).
    - `key`: a random key, of the dequantisation, the noise and the probes.
    - `levels`: as in `dequantise`; 256.
    - `low`, `high`: as in `dequantise`, for what the model saw; the scaling of `fit`.
    - `draws`: over how many (2) averages, each a solve; more tighten the bound; 1.
    - `correct`: make the step (3) from t_min to data; True. Without it, and for a
      model on an interpolant, the density at t_min is taken for that of v.
    - `cond`: the condition, a pytree with leading axis batch; none.
    - `options`: any other option of `log_likelihood`.

    **Raises:** a ValueError for what are no such images, and as `log_likelihood`.
    """
    low, high = _range(levels, low, high)
    images = _checked_images(images, levels)
    if not is_whole(draws):
        raise ValueError(f"draws must be a whole number >= 1, got {draws!r}.")
    cond = conditions(model, cond, len(images))
    correct = correct and isinstance(model, AbstractDenoiser)
    if correct:
        noise = model.path.noise  # pyright: ignore[reportAttributeAccessIssue]
        if jax.eval_shape(noise.log_prob, jnp.zeros(images.shape[1:])) is None:
            raise ValueError(
                "the step from t_min to data needs the density of "
                f"{type(noise).__name__}, which is not known: take correct=False."
            )
    key, found, each = random_key(key), [], []
    for draw in range(draws):
        keys = jax.random.split(jax.random.fold_in(key, draw), 3)
        x = dequantise(keys[0], images, levels=levels, low=low, high=high)
        x, step = _to_start(model, keys[1], x, cond) if correct else (x, 0.0)
        found.append(log_likelihood(model, x, key=keys[2], cond=cond, **options))
        each.append(found[-1].value + step)
    each, unit = jnp.stack(each), images[0].size * math.log(2)
    if options.get("probes", "exact") == "exact":
        log_p = jax.nn.logsumexp(each, axis=0) - math.log(draws)
        variance = jnp.var(jnp.exp(each - log_p), axis=0)
    else:  # the exponential of a noisy number is biased
        log_p, variance = jnp.mean(each, axis=0), jnp.var(each, axis=0)
    bar, variance = found[0].standard_error, variance / max(draws - 1, 1)
    spread = student(draws) * root(variance)
    bar = spread if draws > 1 else jnp.where(bar > 0, bar, jnp.nan)
    rows = ((one.evaluations, one.solver_error, one.ok) for one in found)
    counts, errors, ok = map(jnp.stack, zip(*rows, strict=True))
    return BitsPerDim(
        math.log2(levels / (high - low)) - log_p / unit,
        bar / unit,
        jnp.mean(errors, axis=0) / unit,
        jnp.where((counts < 0).any(), -1, jnp.sum(counts) + draws * int(correct)),
        ok.all(axis=0),
    )


def _range(levels, low, high):
    """The range of the bins, by default that of the scaling of `fit`."""
    if not is_whole(levels, 2):
        raise ValueError(f"levels must be a whole number >= 2, got {levels!r}.")
    edge = levels / (levels - 1)  # half a bin beyond 1
    low, high = -edge if low is None else low, edge if high is None else high
    if not is_traced((low, high)) and not low < high:
        raise ValueError(f"the scaled range needs low < high, got [{low}, {high}].")
    return low, high


def _checked_images(images, levels):
    if not is_traced(images):
        images = np.asarray(images)
    if images.ndim < 2 or not jnp.issubdtype(images.dtype, jnp.integer):
        raise ValueError(
            f"bits_per_dim takes integer images (batch, ...) from 0 to {levels - 1}, "
            f"before they are scaled, got {images.dtype} of shape {images.shape}."
        )
    if images.size == 0:
        raise ValueError("bits_per_dim got no image: there is nothing to score.")
    if is_traced(images):  # their values are not known yet
        return images
    least, most = int(images.min()), int(images.max())
    if least < 0 or most >= levels:
        raise ValueError(
            f"images of {levels} levels have values from 0 to {levels - 1}, got "
            f"{least} to {most}. Give levels=, or the images before any scaling."
        )
    return jnp.asarray(images)


@eqx.filter_jit
def _to_start(denoiser, key, v, cond):
    """x at t_min, and (3)."""
    path, t = denoiser.path, float_array(denoiser.path.t_min)
    v = v.astype(t.dtype)
    keys = sample_keys(key, jnp.arange(len(v)))
    z = jax.vmap(lambda k: path.noise.sample(k, v.shape[1:], t.dtype))(keys)
    alpha, sigma = path.scales(t)
    x = alpha * basis_of(path).coordinates(v) + sigma * z
    log_prob = jax.vmap(path.noise.log_prob)
    step = log_prob(z - denoiser.eps(t, x, cond)) - log_prob(z)
    stretch = jnp.sum(jnp.log(jnp.broadcast_to(alpha, v.shape[1:])))
    return basis_of(path).data(x), step + stretch
