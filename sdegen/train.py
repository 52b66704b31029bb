"""Training: a pure step on a state of arrays, many steps to one dispatch.

A step is a function of (state, data, key): the batch, the noise and the times of step n
are functions of the seed and n alone. `train_step` is pure and is what `fit` scans; it
also runs as it is under `jax.pmap` or `shard_map`, given the axis name (networks with
our convolutions, and Diffrax itself, need `shard_map(check_vma=False)`).
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from . import checkpoint
from .data.batches import batch_indices
from .loss import denoising_loss
from .mesh import batch_sharding, replicated
from .optimizer import AbstractOptimizer, AdamW, Given, global_norm
from .record import Recorder, progress_bar
from .typing import PyTree, RandomKey, Scalar, ScalarLike, float_array

_KEEP_EVERY = 10.0  # seconds between copies of a good state, from which fit can go back


class TrainState(eqx.Module):
    """All that training changes: network, its average, optimiser state, step."""

    network: Any
    ema: Any
    opt_state: PyTree
    step: Int[Array, ""]


def init_state(network: Any, transform: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the moving average starts at the network."""
    params = eqx.filter(network, eqx.is_inexact_array)

    # a copy: the state's buffers are donated, the network's stay the caller's
    def own(tree):
        return jax.tree.map(lambda a: jnp.array(a) if eqx.is_array(a) else a, tree)

    if not jax.tree.leaves(params):
        raise ValueError("the network has no floating-point arrays: nothing to train.")
    return TrainState(own(network), own(network), transform.init(params), jnp.array(0))


def train_step(
    state: TrainState,
    denoiser: eqx.Module,
    transform: optax.GradientTransformation,
    x0: Float[Array, "batch ..."],
    cond: PyTree,
    key: RandomKey,
    *,
    loss: Callable = denoising_loss,
    ema: ScalarLike = 0.999,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, Scalar]]:
    """One step: (state, batch) -> (state, metrics). Pure; jit it, or scan it.

    **Arguments:** `denoiser`, whose network is replaced by the state's; `key`, of the
    whole run: step n uses fold_in(key, n); `loss(denoiser, key, x0, cond,
    axis_name=...)`; `ema`, the decay of the moving average, warmed up as min(ema, (1 +
    n) / (10 + n)); `axis_name`, the mapped axis if the batch is one device's part of
    it.

    **Returns:** the next state, and `loss`, `grad_norm` and `update_norm`, which
    the caller looks at now and then: the step itself never raises.
    """
    step_key = jax.random.fold_in(key, state.step)

    def objective(network):
        full = dataclasses.replace(denoiser, network=network)
        value = loss(full, step_key, x0, cond, axis_name=axis_name)
        # The mean belongs inside: where autodiff sums gradients of replicated arrays
        # by itself (shard_map with its checks) it then sums the right thing.
        return value if axis_name is None else jax.lax.pmean(value, axis_name)

    value, grads = eqx.filter_value_and_grad(objective)(state.network)
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
    params = eqx.filter(state.network, eqx.is_inexact_array)
    updates, opt_state = transform.update(grads, state.opt_state, params)
    network = eqx.apply_updates(state.network, updates)
    n = state.step.astype(jnp.float32)
    decay = jnp.minimum(ema, (1 + n) / (10 + n))

    def average(old, new):
        return old + (1 - decay).astype(old.dtype) * (new - old)

    moving = jax.tree.map(
        lambda old, new: average(old, new) if eqx.is_inexact_array(old) else new,
        state.ema,
        network,
    )
    new = TrainState(network, moving, opt_state, state.step + 1)
    return new, {
        "loss": value,
        "grad_norm": global_norm(grads),
        "update_norm": global_norm(updates),
    }


class NonFiniteError(FloatingPointError):
    """Training met a loss or a gradient that is not finite.

    `step` is the first such step; `state` is the state just before it, all finite;
    `checkpoint` is where it was saved, or None.
    """

    def __init__(self, message: str, step: int, state: TrainState, path: Path | None):
        super().__init__(message)
        self.step, self.state, self.checkpoint = step, state, path


@dataclasses.dataclass(frozen=True)
class Fit:
    """What `fit` returns: the denoiser with the averaged network, the last state."""

    denoiser: Any
    state: TrainState
    losses: Float[np.ndarray, " steps"]


def fit(
    denoiser: eqx.Module,
    data: Array | np.ndarray,
    *,
    steps: int,
    batch_size: int = 128,
    seed: int = 0,
    optimizer: AbstractOptimizer | optax.GradientTransformation | None = None,
    cond: PyTree = None,
    loss: Callable = denoising_loss,
    ema: ScalarLike = 0.999,
    steps_per_call: int = 50,
    recorder: Recorder | None = None,
    directory: str | Path | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> Fit:
    """Train the denoiser's network on an array of data; the path is left as it is.

    **Arguments:** `denoiser`, or any module with a field `network` that `loss` takes;
    `data`, (n, ...) floating point, kept on the device; `cond`, arrays with leading
    axis n, or None; `optimizer`, a module of `sdegen.optimizer` or any Optax
    transformation; `loss`, for instance `eqx.Partial(denoising_loss,
    times=LogNormal())`; `ema`, the decay of the averaged network; `steps_per_call`,
    steps in one compiled call; `recorder`, gets one row per call; `directory`, where
    the last state is saved as `state`; `mesh`, spreads every batch over its "data"
    axis.

    **Raises:** `NonFiniteError` when the loss stops being finite; the last good state
    is in it, and in `directory` as `state`, if one was given.
    """
    if steps < 1 or steps_per_call < 1:
        raise ValueError(
            f"fit needs steps >= 1 and steps_per_call >= 1, got {steps} and "
            f"{steps_per_call}."
        )
    target = None if directory is None else Path(directory).absolute() / "state"
    if target is not None and target.exists():
        raise FileExistsError(
            f"{target} exists already: a run is saved there. Choose another directory."
        )
    data = _check_data(data, cond, batch_size, mesh)
    call, leaves, structure = make_call(
        denoiser,
        data,
        steps=steps,
        seed=seed,
        optimizer=optimizer,
        cond=cond,
        loss=loss,
        ema=ema,
        mesh=mesh,
    )

    def run(leaves, first, count):
        index = batch_indices(seed, first, count, n=len(data), batch_size=batch_size)
        leaves, metrics = call(leaves, jnp.asarray(index))
        # Waiting here also bounds how far the host runs ahead of the devices.
        return leaves, jax.device_get(metrics)

    losses, done, began = [], 0, time.perf_counter()
    good, kept = (0, _copy(leaves)), began
    with progress_bar(steps, progress) as bar:
        while done < steps:
            count = min(steps_per_call, steps - done)
            leaves, metrics = run(leaves, done, count)
            finite = np.logical_and.reduce([np.isfinite(m) for m in metrics.values()])
            if not finite.all():
                bad = int(np.argmin(finite))
                # Back to the copy, and again up to the bad step: the same numbers.
                first, leaves = good
                while first < done + bad:
                    count = min(steps_per_call, done + bad - first)
                    leaves, _ = run(leaves, first, count)
                    first += count
                state = jax.tree.unflatten(structure, leaves)
                raise _non_finite(done + bad, metrics["loss"][bad], state, target)
            done += count
            now = time.perf_counter()
            if now - kept > _KEEP_EVERY:
                good, kept = (done, _copy(leaves)), now
            losses.append(metrics["loss"])
            mean, rate = float(losses[-1].mean()), done / (now - began)
            bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
            bar.update(count)
            if recorder is not None:
                norm = float(metrics["grad_norm"].mean())
                recorder.row(
                    step=done, loss=mean, grad_norm=norm, steps_per_second=rate
                )
    state = jax.tree.unflatten(structure, leaves)
    if target is not None:
        checkpoint.save(target, state)
    averaged = dataclasses.replace(denoiser, network=state.ema)
    return Fit(averaged, state, np.concatenate(losses))


def make_call(
    denoiser: eqx.Module,
    data: Float[Array, "n ..."],
    *,
    steps: int,
    seed: int = 0,
    optimizer: AbstractOptimizer | optax.GradientTransformation | None = None,
    cond: PyTree = None,
    loss: Callable = denoising_loss,
    ema: ScalarLike = 0.999,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Callable, list[Array], Any]:
    """The compiled loop of `fit`: many steps of a run of `steps` steps to one dispatch.

    **Returns:** (call, leaves, structure): `call(leaves, index) -> (leaves, metrics)`
    runs one step for each row of `index` (rows of `data`, int32) and donates `leaves`;
    the state is `jax.tree.unflatten(structure, leaves)`. Leaves, because a network
    crosses the jit boundary far faster as a flat list than as a tree of objects.
    """
    optimizer = AdamW() if optimizer is None else optimizer
    if isinstance(optimizer, optax.GradientTransformation):
        optimizer = Given(optimizer)
    if not isinstance(optimizer, AbstractOptimizer):
        raise ValueError(
            "optimizer must be a module such as sdegen.AdamW(), or an Optax "
            f"transformation such as optax.adam(1e-3), got {optimizer!r:.60}."
        )
    cond = jax.tree.map(jnp.asarray, cond)
    state = init_state(denoiser.network, optimizer.transform(steps))
    shell = dataclasses.replace(denoiser, network=None)
    extras = (
        shell,
        optimizer,
        loss,
        float_array(ema),
        jax.random.key(seed),
        data,
        cond,
    )
    if mesh is not None:
        state, extras = _replicate((state, extras), mesh)
    leaves, structure = jax.tree.flatten(state)
    arrays, static = eqx.partition(extras, eqx.is_array)
    static_leaves, static_structure = jax.tree.flatten(static)
    static = (structure, tuple(static_leaves), static_structure, steps, mesh)

    def call(leaves, index):
        return _run(leaves, arrays, index, static)

    return call, leaves, structure


@functools.partial(jax.jit, static_argnums=(3,), donate_argnums=(0,))
def _run(leaves, arrays, index, static):
    """Scan `train_step` over the rows of `index`."""
    structure, static_leaves, static_structure, steps, mesh = static
    static = jax.tree.unflatten(static_structure, static_leaves)
    shell, optimizer, loss, ema, key, data, cond = eqx.combine(arrays, static)
    transform = optimizer.transform(steps)

    def place(x):
        if mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))

    def body(leaves, rows):
        state = jax.tree.unflatten(structure, leaves)
        x0, c = jax.tree.map(lambda a: place(a[rows]), (data, cond))
        state, metrics = train_step(
            state, shell, transform, x0, c, key, loss=loss, ema=ema
        )
        return jax.tree.leaves(state), metrics

    return jax.lax.scan(body, leaves, index)


@jax.jit
def _copy(leaves):
    return [jnp.copy(leaf) for leaf in leaves]


def _check_data(data, cond, batch_size, mesh):
    host = np.asarray(data)
    if host.ndim < 2 or not jnp.issubdtype(host.dtype, jnp.floating):
        raise ValueError(
            "fit takes floating-point data of shape (n, ...), at least two axes, got "
            f"{host.dtype} of shape {host.shape}. Scale images to about [-1, 1]; use "
            "data[:, None] for 1-D data."
        )
    if not len(host):
        raise ValueError(f"the data are empty: an array of shape {host.shape}.")
    if not np.isfinite(host).all():
        row = int(np.argmin(np.isfinite(host.reshape(len(host), -1)).all(axis=1)))
        raise ValueError(
            f"the data must be finite, but row {row} holds NaN or infinity. Remove or "
            "repair it; nothing was trained or written."
        )
    for leaf in map(np.asarray, jax.tree.leaves(cond)):
        if leaf.shape[:1] != host.shape[:1]:
            raise ValueError(
                f"cond must have one row per sample: {len(host)} samples, got an array "
                f"of shape {leaf.shape}."
            )
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(leaf).all():
            raise ValueError("cond must be finite, but it holds NaN or infinity.")
    if mesh is not None and "data" not in mesh.shape:
        raise ValueError(
            f'fit needs a mesh with an axis "data", got axes {mesh.axis_names}. See '
            "sdegen.mesh.data_mesh()."
        )
    parts = 1 if mesh is None else mesh.shape["data"]
    if batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"batch_size must be positive and divisible by the {parts} devices of the "
            f"mesh, got {batch_size}."
        )
    return jnp.asarray(data)


def _replicate(tree, mesh):
    def put(leaf):
        return jax.device_put(leaf, replicated(mesh)) if eqx.is_array(leaf) else leaf

    return jax.tree.map(put, tree)


def _non_finite(step, value, state, target):
    saved = None
    if target is not None:
        saved = checkpoint.save(target, state)
    place = "it is in this error's `state`" if saved is None else f"saved in {saved}"
    return NonFiniteError(
        f"step {step} gave a loss of {value}, or a gradient or update that is not "
        f"finite; training stopped there. The last good state, after {int(state.step)} "
        f"steps, is kept: {place}. Try a smaller learning rate or more warm-up.",
        step,
        state,
        saved,
    )
