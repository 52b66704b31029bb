"""One batch for every loss: times, noise, pairs and conditions, and what to regress on.

Sample i has the same numbers on any devices. Models are known by what they have:

    model                 `target` is that of                `x1`       `z`
    Denoiser              predict(t, x_t, cond)              the noise  None
    VDM                   denoiser.predict(t, x_t, cond)     the noise  None
    VelocityModel         velocity(t, x_t, cond)             x1         latent noise
    SchroedingerBridge    down and up, a pair                x1         latent noise
    ScoreModel            score(t, x_t, cond)                None       None
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from ..processes.interpolant import AbstractInterpolant
from ..processes.path import AbstractPath, basis_of, batched, check_sample
from ..processes.prediction import Prediction
from ..processes.sde import AbstractSDE
from ..typing import AxisName, PyTree, Seed, condition_arrays, data_array, random_key
from .coupling.pairs import PairedData, couple, independent
from .per_sample import batch_index, draw_each, sample_keys
from .simulated_paths import chain, targets
from .times import AbstractTimes, OfProcess

Data: TypeAlias = Float[Array, "batch ..."]


class Batch(NamedTuple):
    """What `draw_batch` has drawn; row i of each array belongs to sample i."""

    t: Float[Array, " batch"]
    x_t: Data
    target: Any
    """An unbiased target of the model's output at (t, x_t); a pair for a bridge."""
    x0: Data
    x1: Data | None
    z: Data | None
    cond: PyTree
    keys: Key[Array, " batch"]
    """An unused key for each sample, for dropout."""
    aux: dict[str, Array]
    """Numbers to be watched that a coupling gives, see `sdegen.coupling.Pairs`."""


@runtime_checkable
class OnPath(Protocol):
    """A prediction on a path: a `Denoiser` or a `VDM`."""

    path: AbstractPath
    prediction: Prediction
    data_scale: Any
    overall_sigma_data: Any


@runtime_checkable
class Predicts(OnPath, Protocol):
    """What `denoising_loss` trains."""

    predict: Callable


@runtime_checkable
class HasVelocity(Protocol):
    """What `velocity_loss` trains."""

    interpolant: AbstractInterpolant
    velocity: Callable
    latent: Callable
    latent_network: Any


@runtime_checkable
class HasDrifts(Protocol):
    """What `bridge_loss` trains."""

    interpolant: AbstractInterpolant
    sigma: Any
    down: Callable
    up: Callable


@runtime_checkable
class HasScore(Protocol):
    """What the losses of score matching train."""

    sde: AbstractSDE
    clock: Array
    noise: Array
    weights: Array | None
    score: Callable


@runtime_checkable
class HasSchedule(Protocol):
    """What `vdm_loss` trains."""

    gamma: Any
    denoiser: Any
    with_trained: Callable


@runtime_checkable
class DrawsBatches(Protocol):
    """A model that draws its own batches, by the arguments of `draw_batch`."""

    draw_batch: Callable


_OWN: dict[Any, str] = {
    HasSchedule: "vdm_loss",
    Predicts: "denoising_loss",
    HasVelocity: "velocity_loss",
    HasDrifts: "bridge_loss",
    HasScore: "simulated_score_loss",
}


def check_model(loss: str, protocol: Any, model: Any) -> None:
    """Refuse a model that a loss cannot train; the sentence names the model's own."""
    if isinstance(model, protocol):
        return
    bases = [vars(b).get("__annotations__", ()) for b in reversed(protocol.__mro__)]
    names = ", ".join(f"`{name}`" for base in bases for name in base)
    own = next((n for kind, n in _OWN.items() if isinstance(model, kind)), None)
    raise ValueError(
        f"{loss} trains a model that has {names}, got {type(model).__name__}. Its own "
        f"loss is {own or 'its method `loss`'}, which `fit` takes without loss=."
    )


def draw_batch(
    model: Any,
    key: Seed,
    x0: Num[Array, "batch ..."],
    cond: PyTree = None,
    *,
    coupling: Callable = independent,
    times: AbstractTimes | None = None,
    axis_name: AxisName | None = None,
) -> Batch:
    """A training batch of any model: `t`, `x_t` and the `target` of its output there.

    Every loss begins here; docs/training.md has a training loop of one's own.

    **Arguments:**
    - `model`: one of those above, or one with a method `draw_batch` of its own.
    - `key`: the key of the batch, or a seed; sample i draws from its own part of it.
    - `x0`: floating-point data, (batch, ...).
    - `cond`: a pytree of arrays with leading axis batch, or None.
    - `coupling`: which x1 goes with which x0, see `sdegen.coupling`; `independent`.
    - `times`: the distribution of t, see `sdegen.times`; `OfProcess`, stratified, which
      is uniform on most paths.
    - `axis_name`: the mapped axis, if `x0` is one device's part of the batch.

    **Returns:** a `Batch`. On a path with a basis x0, x_t and the target are in its
    coordinates.

    **Raises:** ValueError for a model, data or a coupling that do not fit.
    """
    options = {"coupling": coupling, "times": times, "axis_name": axis_name}
    key = random_key(key)
    if isinstance(model, DrawsBatches):
        cond = condition_arrays(cond, len(x0))
        return model.draw_batch(key, x0, cond, **options)
    x0 = jnp.asarray(data_array(x0, "a loss"))
    cond = condition_arrays(cond, len(x0))
    if isinstance(model, HasScore):
        if coupling is not independent or times is not None:
            name = type(model).__name__
            raise ValueError(
                f"{name} simulates paths from x0: it takes no coupling and no times."
            )
        return simulated_batch(model, key, x0, cond, draws=1, axis_name=axis_name)[0]
    if times is None:
        times = OfProcess(getattr(model, "overall_sigma_data", 0.5))
    options["times"] = times
    if isinstance(model, OnPath | HasVelocity | HasDrifts):
        return _draw(model, key, x0, cond, **options)
    raise ValueError(
        f"draw_batch knows no batch of {type(model).__name__}. Give its class a method "
        "`draw_batch(key, x0, cond, *, coupling, times, axis_name)`."
    )


def _check_scale(scale, shape):
    """Refuse a `sigma_data` that is for samples of another shape."""
    try:
        fits = jnp.broadcast_shapes(jnp.shape(scale), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"sigma_data has the shape {jnp.shape(scale)}, which does not broadcast to "
            f"one sample of shape {shape}. Give one number, or one for each coordinate."
        )


def _draw(model, key, x0, cond, *, coupling, times, axis_name):
    on_path = isinstance(model, OnPath)
    path = model.path if on_path else model.interpolant
    index, total = batch_index(len(x0), axis_name)
    time_key, end_key, *latent, pair_key = jax.random.split(key, 3 if on_path else 4)
    t = times.draw(time_key, path, index, total, x0.dtype)  # float32 at least
    keys, kind, z = sample_keys(end_key, index), (x0.shape[1:], x0.dtype), None
    x1 = draw_each(path.noise.sample, keys, *kind)
    if on_path:
        check_sample(path, x0.shape[1:])
        _check_scale(model.data_scale, x0.shape[1:])
        basis = basis_of(path)
        if isinstance(cond, PairedData):
            cond = cond._replace(x1=basis.coordinates(cond.x1))
        x0 = basis.coordinates(x0)
    else:
        keys = sample_keys(latent[0], index)
        z = draw_each(jax.random.normal, keys, *kind)
    x0, x1, cond, aux = couple(coupling, pair_key, x0, x1, cond, axis_name=axis_name)
    x_t, target = (_on_path if on_path else _between)(model, t, x0, x1, z)
    drop = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)  # apart from the noise
    return Batch(t, x_t, target, x0, x1, z, cond, drop, dict(aux))


def _on_path(model, t, x0, x1, _):
    """x_t = alpha x0 + sigma x1, and the target a x0 + b x1 of `model.prediction`."""

    def coefficients(t):
        row = model.prediction.row(model.path, t, model.data_scale)
        return row, model.path.alpha(t), model.path.sigma(t)

    (a, b), alpha, sigma = batched(coefficients, t, x0)
    return (alpha * x0 + sigma * x1).astype(x0.dtype), a * x0 + b * x1


def _between(model, t, x0, x1, z):
    """x_t of an interpolant, and its velocity or both drifts of its bridge."""
    path = model.interpolant
    x_t = jax.vmap(path.point)(t, x0, x1, z).astype(x0.dtype)
    if isinstance(model, HasDrifts):
        to_x0, to_x1 = bridge_noise(model.sigma, t, z)
        return x_t, (x0 - x1 + to_x0, x1 - x0 + to_x1)
    return x_t, jax.vmap(path.velocity)(t, x0, x1, z).astype(x0.dtype)


def bridge_noise(sigma: Any, t: Float[Array, " batch"], z: Data) -> tuple[Data, Data]:
    """What z adds to the drifts of a Brownian bridge: (towards x0, towards x1)."""
    t = t.reshape(-1, *[1] * (z.ndim - 1))
    return -sigma * jnp.sqrt((1 - t) / t) * z, -sigma * jnp.sqrt(t / (1 - t)) * z


def simulated_batch(
    model: HasScore,
    key: Seed,
    x0: Data,
    cond: PyTree = None,
    *,
    draws: int = 8,
    axis_name: AxisName | None = None,
    with_targets: bool = True,
) -> tuple[Batch, Float[Array, "rows ..."]]:
    """Where the simulated paths of `x0` were at `draws` steps each, and sigma there.

    The rows are batch * draws, samples first; the steps one in each of equal strata.
    Arguments as for `simulated_score_loss`; without targets `target` is None.
    """
    x0 = jnp.asarray(data_array(x0, "a loss"))
    cond, key = condition_arrays(cond, len(x0)), random_key(key)
    ts = model.clock.astype(x0.dtype)
    steps = len(ts) - 1
    if not 1 <= draws <= steps:
        raise ValueError(f"draws must be 1 to {steps}, the steps, got {draws}.")
    keys = sample_keys(key, batch_index(len(x0), axis_name)[0])
    path, pick, own = jax.vmap(lambda k: tuple(jax.random.split(k, 3)))(keys)
    xs = chain(model.sde, path, x0, ts)
    u = draw_each(jax.random.uniform, pick, (), x0.dtype)
    u = (jnp.arange(draws) + u[:, None]) / draws  # (batch, draws)
    k = jnp.minimum((u * steps).astype(int), steps - 1)

    def take(rows):
        """Rows k of every sample's own sequence, within one device."""
        own = jax.vmap(lambda row, k: row[k], (1, 0))(rows, k)
        return own.reshape(-1, *own.shape[2:])

    x, t, target = take(xs[1:]), ts[1:][k].reshape(-1), None
    if with_targets:
        found = targets(model.sde, ts, xs, model.weights)
        target = take(jax.lax.stop_gradient(found))
    x0, cond = jax.tree.map(lambda c: jnp.repeat(c, draws, axis=0), (x0, cond))
    sigma = model.noise[1:][k].reshape(x.shape).astype(x.dtype)
    return Batch(t, x, target, x0, None, None, cond, own, {}), sigma
