"""How far a model's score is from the truth, and what that means for its samples.

With s the exact score and s_hat the model's, at a time t (Vincent 2011),

    E|s_hat + z / sigma|^2 = E|s_hat - s|^2 + C,    C = d / sigma^2 - E|s|^2       (1)

the conditional loss is the score matching error plus a constant. For two processes, one
with the exact denoiser, one with the model's, driven by the same Brownian motion,

    W2(p_0, q_0) <= int I(t) (E|F - F_hat|^2)^(1/2) dt + I(T) W2(p_T, q_T)         (2)
    I(t) = exp int_0^t L,    -(F_hat(x) - F_hat(y)) . (x - y) <= L |x - y|^2       (3)

with F the drift from data to noise, the expectation over the exact distribution, and L,
which may be negative, of the model's field in the direction of sampling (Kwon et al.
2022, "Score-based generative modeling secretly minimizes the Wasserstein distance",
theorem 1). (2) is computed in `coordinates`, where F is finite at both ends.
"""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..models.denoiser import AbstractDenoiser
from ..models.model import Points, check_gaussian, conditions
from ..models.problem import noise_level
from ..processes.normaliser import Normaliser, check_units
from ..processes.path import basis_of, check_one_level, logsnr_span
from ..solvers.semilinear import root
from ..solvers.solve import checked, solve
from ..typing import PyTree, Scalar, ScalarLike, float_array
from .coordinates import AngleFlow, angle_of, sum_per_sample, unit_vectors


class ScoreError(eqx.Module):
    """The three terms of (1) at given times, summed over coordinates.

    Multiply by sigma(t)^2 for the loss of the noise prediction.
    """

    matching: Float[Array, "*times"]  # E|s_hat - s|^2
    conditional: Float[Array, "*times"]  # E|s_hat + z / sigma|^2
    irreducible: Float[Array, "*times"]  # C


def score_error(
    denoiser: AbstractDenoiser,
    exact: AbstractDenoiser,
    t: Float[Array, "*times"] | ScalarLike,
    x0: Points,
    z: Points,
    *,
    weights: Float[Array, " batch"] | None = None,
    cond: PyTree = None,
) -> ScoreError:
    """The terms of (1) as means over the pairs (x0, z), for Gaussian noise.

    **Arguments:**
    - `denoiser`: the model.
    - `exact`: the denoiser of the distribution of the data, on the same path.
    - `t`: times, () or (times,).
    - `x0`, `z`: draws of data and noise, or the nodes of a quadrature, (batch, ...).
    - `weights`: of the pairs, (batch,), with sum 1; equal.
    - `cond`: the condition, a pytree with leading axis batch; none.

    **Returns:** a `ScoreError` with arrays of the shape of `t`.

    **Raises:** a ValueError for noise that is not Gaussian, and for wrong shapes.
    """
    check_one_level(denoiser.path, "score_error")
    for path in (denoiser.path, exact.path):
        if not path.noise.gaussian:
            raise ValueError(
                "the score error is for Gaussian noise, got a denoiser on "
                f"{type(path).__name__} with noise={type(path.noise).__name__}."
            )
    t = float_array(t).astype(float_array(denoiser.path.t_min).dtype)
    _check_pairs("score_error", x0, z)
    check_units("score_error", denoiser.path, exact.path)
    x0 = basis_of(denoiser.path).coordinates(x0)
    if t.ndim > 1:
        raise ValueError(f"score_error takes t of shape () or (times,), got {t.shape}.")
    cond = conditions(denoiser, cond, len(x0))
    return _score_error(denoiser, exact, t, x0, z, weights, cond)


@eqx.filter_jit
def _score_error(denoiser, exact, t, x0, z, weights, cond):
    def at(t):
        alpha, sigma = denoiser.path.scales(t)
        x = alpha * x0 + sigma * z
        model, truth = denoiser.eps(t, x, cond), exact.eps(t, x, cond)
        square = lambda e: _mean_square(e, weights) / sigma**2  # noqa: E731
        return ScoreError(square(model - truth), square(model - z), square(truth - z))

    return jax.lax.map(at, t) if t.ndim else at(t)


def _check_pairs(what, x0, z):
    if x0.shape != z.shape or x0.ndim < 2:
        raise ValueError(
            f"{what} takes pairs x0 and z of the same shape (batch, ...), got "
            f"{x0.shape} and {z.shape}."
        )


def _mean_square(error, weights):
    values = sum_per_sample(error**2)
    return jnp.mean(values) if weights is None else jnp.sum(weights * values)


class WassersteinBound(eqx.Module):
    """An estimate of the right-hand side of (2), in the units of the data.

    `value` = `from_score` + `from_noise`, the integral and the last term; `growth` is
    I(T). L is the largest over the given points, so the estimate may be too small; with
    a network it is usually far above the distance. `ok`: t_max was reached.
    """

    value: Scalar
    from_score: Scalar
    from_noise: Scalar
    growth: Scalar
    ok: Array


def wasserstein_bound(
    denoiser: AbstractDenoiser,
    exact: AbstractDenoiser,
    x0: Points,
    z: Points,
    *,
    stochasticity: ScalarLike = 0.0,
    weights: Float[Array, " batch"] | None = None,
    start: ScalarLike = 0.0,
    steps: int = 64,
    cond: PyTree = None,
) -> WassersteinBound:
    """The bound (2) on W2 at t_min, integrated to a log-SNR of -13.8 at the lowest.

    **Arguments:**
    - `denoiser`: the model.
    - `exact`: the denoiser of the distribution of the data, on the same path.
    - `x0`, `z`: pairs of data and noise, the same at every time, (batch, ...).
    - `stochasticity`: 0 for the flow, 1 for the reverse SDE; 0.
    - `weights`: of the pairs, (batch,), with sum 1; equal.
    - `start`: W2 at t_max between the exact distribution and that of sampling; 0.
    - `steps`: of Tsit5, equal in log-SNR, with 6 d derivatives of the model each; 64.
    - `cond`: the condition, a pytree with leading axis batch; none.

    **Raises:** a ValueError for different paths, and as `score_error`.
    """
    _check_pairs("wasserstein_bound", x0, z)
    if isinstance(basis_of(denoiser.path), Normaliser):
        raise ValueError(
            "wasserstein_bound is in the units of the path, and this model's have a "
            "Normaliser. Train it with sigma_data=, or compare in its units: "
            "w2 of what `model.normaliser.coordinates` makes of the samples."
        )
    if type(denoiser.path) is not type(exact.path):
        raise ValueError(
            "wasserstein_bound compares two denoisers on one path, got "
            f"{type(denoiser.path).__name__} and {type(exact.path).__name__}."
        )
    check_one_level(denoiser.path, "wasserstein_bound")
    if steps < 1:
        raise ValueError(f"wasserstein_bound needs at least one step, got {steps}.")
    level, dtype = noise_level(stochasticity), float_array(denoiser.path.t_min).dtype
    if level is not None:
        check_gaussian(denoiser.path, "the reverse SDE needs", " Take stochasticity=0.")
        level = level.astype(dtype)
    start = float_array(start).astype(dtype)
    cond = conditions(denoiser, cond, len(x0))
    return _bound(denoiser, exact, x0, z, level, weights, start, steps, cond)


@eqx.filter_jit
def _bound(denoiser, exact, x0, z, stochasticity, weights, start, steps, cond):
    path, angle = denoiser.path, angle_of(denoiser)
    both = (denoiser, exact)
    model, truth = (AngleFlow(one, angle, cond, stochasticity) for one in both)
    # In the clock log tan(xi), half the falling log-SNR: a model may be wrong in z_hat
    # at the noise, where the gap in xi is then like 1 / cos(xi).
    high, low = (-jnp.log(angle.size) - logsnr / 2 for logsnr in logsnr_span(path))

    def rates(clock, state, args):
        """Of (log I, the integral); the model and the truth at the same points."""
        log_growth, _ = state
        xi = jnp.arctan(jnp.exp(clock))
        t, rate = angle.time(xi), jnp.sin(xi) * jnp.cos(xi)
        x = path.alpha(t) * x0 + path.sigma(t) * z
        u = x / angle.scale(t)
        gap = _mean_square(model(xi, u) - truth(xi, u), weights)
        fastest = _largest_eigenvalue(lambda u: -model(xi, u), u)
        return rate * fastest, rate * jnp.exp(log_growth) * root(gap)

    clock = jnp.linspace(low, high, steps + 1)
    zero = jnp.zeros((), clock.dtype)
    found = solve(rates, (zero, zero), clock, dfx.Tsit5())
    log_growth, integral = (leaf[-1] for leaf in found.ys)
    # x = scale u at the data, u = x / scale at the noise
    ends = (angle.time(jnp.arctan(jnp.exp(end))) for end in (low, high))
    scale_0, scale_t = map(angle.scale, ends)
    growth = jnp.exp(log_growth) * scale_0 / scale_t
    from_score, from_noise = scale_0 * integral, growth * start
    value = from_score + from_noise
    ok = (checked(found.result, value[None]) == dfx.RESULTS.successful)[0]
    return WassersteinBound(value, from_score, from_noise, growth, ok)


def _largest_eigenvalue(field, u):
    """The largest eigenvalue, over the batch, of the symmetric part of d field / du."""
    size, basis = u[0].size, unit_vectors(u.shape[1:], u.dtype)
    _, push = jax.linearize(field, u)
    along = lambda e: push(jnp.broadcast_to(e, u.shape))  # noqa: E731
    columns = jax.lax.map(along, basis, batch_size=32)
    jacobian = jnp.moveaxis(columns.reshape(size, len(u), size), 0, 2)
    symmetric = (jacobian + jnp.swapaxes(jacobian, 1, 2)) / 2
    return jnp.max(jnp.linalg.eigvalsh(symmetric)[:, -1])
