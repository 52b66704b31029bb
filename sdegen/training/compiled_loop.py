"""The compiled loop: many steps to one dispatch, on one device or on a mesh.

On a mesh the gradient is taken per device, under `shard_map`. What is communicated is:

    "data"   one sum of the gradients over the devices;
    "fsdp"   every parameter is gathered before use, and again for the backward pass,
             and its gradient is summed and scattered in one.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from ..losses.per_sample import batch_index, sample_keys
from ..mesh import batch_axes, parameter_sharding, place, replicated
from ..models.model import AbstractModel
from ..typing import PyTree, RandomKey, ScalarLike
from .config import TrainingConfig, configured
from .ema import as_averages
from .feed import Feed, as_float, take
from .optimizer import as_optimizer
from .step import (
    TrainState,
    apply_gradients,
    check_model,
    gradients,
    init_state,
    own_loss,
    without_trained,
)


def make_call(
    model: AbstractModel,
    feed: Feed,
    config: TrainingConfig | None = None,
    *,
    loss: Callable | None = None,
    **changes: Any,
) -> tuple[Callable, list[Array], Callable]:
    """The compiled loop of `fit`.

    **Arguments:**
    - `model`, `config`, `loss`, `changes`: see `fit`.
    - `feed`: the data, whose seed gives the key of the run.

    **Returns:** (call, leaves, state). `call(leaves, fed) -> (leaves, metrics)` runs a
    step for each row of a chunk of `feed` and donates `leaves`, the arrays of the state
    `state(leaves)`. A third argument, a number for each device, comes back as its
    largest in metrics["stop"]. `call.lower` lowers without running.
    """
    config = configured(TrainingConfig, config, changes, "make_call")
    key = jax.random.key(feed.seed)
    leaves, extras, static = begin(model, key, config, loss, feed.mesh)
    arrays = (extras, feed.arrays)

    class Call:
        def __call__(self, leaves, fed, flags=None):
            return _run(leaves, arrays, fed, flags, static)

        def lower(self, leaves, fed, flags=None):
            return _run.lower(leaves, arrays, fed, flags, static)

    return Call(), leaves, static.state


def begin(
    model: AbstractModel,
    key: RandomKey,
    config: TrainingConfig,
    loss: Callable | None = None,
    mesh: Mesh | None = None,
) -> tuple[list[Array], PyTree, Any]:
    """What `advance` needs for a run: (leaves of the state, extras, static).

    A flat list crosses the jit boundary far faster than a tree of objects. Without a
    mesh this and `advance` are pure: `vmap` makes them those of many runs.

    **Arguments:**
    - `model`, `config`, `loss`, `mesh`: see `fit`.
    - `key`: of the noise of the steps and, apart from it, of their augmentation.
    """
    check_model(model)
    optimizer, averages = as_optimizer(config.optimizer), as_averages(config.ema)
    transform, trained = optimizer.transform(config.steps), model.trained
    loss = loss or own_loss
    extras = (without_trained(model), optimizer, loss, averages, config.augment, key)

    def init(trained):
        return init_state(trained, transform, averages=len(averages))

    if mesh is None:
        state = init(trained)
    else:
        _warn_of_whole_arrays(trained, mesh)
        trained = place(trained, parameter_sharding(trained, mesh))
        extras = place(extras, jax.tree.map(lambda _: replicated(mesh), extras))
        arrays, rest = eqx.partition(trained, eqx.is_array)
        shapes = eqx.filter_eval_shape(init, trained)
        is_shape = lambda a: isinstance(a, jax.ShapeDtypeStruct)  # noqa: E731
        shapes, static = eqx.partition(shapes, is_shape)
        born = jax.jit(
            lambda arrays: eqx.filter(init(eqx.combine(arrays, rest)), eqx.is_array),
            out_shardings=parameter_sharding(shapes, mesh),
        )(arrays)
        state = eqx.combine(born, static)
    (state, extras), rest = eqx.partition((state, extras), eqx.is_array)
    leaves, structure = jax.tree.flatten(state)
    static, inner = jax.tree.flatten(rest)
    parts = (structure, tuple(static), inner, config.steps, config.accumulate, mesh)
    return leaves, extras, _Static(*parts)


class _Static:
    """What a program depends on besides arrays; hashed once, not at every step."""

    def __init__(self, *parts):
        self.parts, self._hash = parts, hash(parts)

    @property
    def rest(self) -> tuple[Any, Any]:
        """What is no array of the state, such as activation functions, and of extras.

        A state without it is a tree of arrays alone.
        """
        return jax.tree.unflatten(self.parts[2], self.parts[1])

    def state(self, leaves: Sequence[Array]) -> TrainState:
        """The state whose arrays these are."""
        return eqx.combine(jax.tree.unflatten(self.parts[0], leaves), self.rest[0])

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return self is other or self.parts == other.parts


def _warn_of_whole_arrays(trained, mesh):
    """Warn where "fsdp" leaves much of the parameters on every device."""
    if mesh.shape.get("fsdp", 1) == 1:
        return
    arrays = jax.tree.leaves(eqx.filter(trained, eqx.is_array))
    pairs = zip(arrays, parameter_sharding(arrays, mesh), strict=True)
    whole = sum(a.size for a, s in pairs if s.is_fully_replicated)
    share = whole / max(sum(a.size for a in arrays), 1)
    if whole > 10**7 and share > 0.2:
        warnings.warn(
            f"{share:.0%} of the parameters stay whole on every device: no axis of "
            f"their arrays is divisible by the {mesh.shape['fsdp']} devices of "
            '"fsdp". A smaller "fsdp" with "data" beside it splits more of them.',
            stacklevel=3,
        )


@functools.partial(jax.jit, static_argnums=(4,), donate_argnums=(0,))
def _run(leaves, arrays, fed, flags, static):
    leaves, metrics = advance(leaves, arrays, fed, static)
    return leaves, metrics if flags is None else metrics | {"stop": jnp.max(flags)}


def advance(leaves, arrays, fed, static):
    """Scan the step over the rows of `fed`: (leaves, metrics of every step).

    `arrays` are the extras of `begin` and the data that the rows are of, or None.
    """
    _, _, _, steps, accumulate, mesh = static.parts
    extras, held = eqx.combine(arrays[0], static.rest[1]), arrays[1]
    shell, optimizer, loss, averages, augment, key = extras
    transform = optimizer.transform(steps)
    given = (shell, loss, augment, key, held)

    def body(leaves, fed):
        state = static.state(leaves)
        value, grads, aux = _gradients(
            state.trained, given, fed, state.step, mesh=mesh, accumulate=accumulate
        )
        state, metrics = apply_gradients(state, value, grads, transform, averages, aux)
        leaves = jax.tree.leaves(eqx.filter(state, eqx.is_array))
        if mesh is not None:
            shardings = parameter_sharding(leaves, mesh)
            leaves = jax.lax.with_sharding_constraint(leaves, shardings)
        return leaves, metrics

    return jax.lax.scan(body, leaves, fed)


def augment_key(key: RandomKey, step: ScalarLike) -> RandomKey:
    """The key of the augmentation of a step of the run of `key`."""
    # Apart from the keys of the steps: no run has so many.
    return jax.random.fold_in(jax.random.fold_in(key, 2**31 - 1), step)


def _part(trained, given, fed, step, *, accumulate, axes=None, dims=None):
    """(loss, gradient, aux) of the batch of `step`, or of a device's part of it."""
    shell, loss, augment, key, held = given
    x0, cond = take(held, fed)
    if augment is not None:
        here = augment_key(key, step)
        x0 = jax.vmap(augment)(sample_keys(here, batch_index(len(x0), axes)[0]), x0)
    x0, key = as_float(x0), jax.random.fold_in(key, step)
    loss = loss if dims is None else _gathering(loss, dims)
    if axes is not None:
        full = shell.with_trained(trained)
        _check_loss(lambda key: loss(full, key, x0, cond, axis_name=axes), key)
    options = {"loss": loss, "axis_name": axes, "accumulate": accumulate}
    return gradients(trained, shell, x0, cond, key, **options)


def _check_loss(loss, key):
    """Refuse a loss that would draw the same numbers on every device."""
    seen = set()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            seen.add(equation.primitive.name)
            for value in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
            ):
                inner = getattr(value, "jaxpr", value)  # closed ones hold another
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(loss)(key).jaxpr)
    if "random_bits" in seen and "axis_index" not in seen:
        raise ValueError(
            "on a mesh every device would draw the same random numbers with this loss, "
            "because it does not look at axis_name. Draw sample i of the whole batch "
            "from fold_in(key, i), with the i of sdegen.losses.batch_index(len(x0), "
            "axis_name), or begin with sdegen.losses.draw_batch."
        )


def _gathering(loss, dims):
    """`loss` of a network whose arrays are one device's parts of the parameters."""
    if all(dim < 0 for dim in jax.tree.leaves(dims)):
        return loss

    def gather(shard, dim):
        if dim < 0:
            return shard
        return jax.lax.all_gather(shard, "fsdp", axis=dim, tiled=True)

    def gathered(model, key, x0, cond, axis_name=None):
        parts, static = eqx.partition(model, eqx.is_array)

        @functools.partial(jax.checkpoint, policy=_keep)
        def inner(parts, key, x0, cond):
            full = eqx.combine(parts, static)
            full = full.with_trained(jax.tree.map(gather, full.trained, dims))
            return loss(full, key, x0, cond, axis_name=axis_name)

        return inner(parts, key, x0, cond)

    return gathered


def _keep(primitive, *_, **__):
    """What is kept for the backward pass: all but whole parameters, in any guise."""
    guises = "convert_element_type transpose reshape broadcast_in_dim squeeze"
    return primitive.name not in ("all_gather", *guises.split())


def _dimensions(trained, mesh):
    """For each leaf the dimension that is split over "fsdp", or -1."""

    def dimension(sharding):
        spec = tuple(sharding.spec)
        return spec.index("fsdp") if "fsdp" in spec else -1

    return jax.tree.map(dimension, parameter_sharding(trained, mesh))


def _gradients(trained, given, fed, step, *, mesh, accumulate):
    """`_part` on every device of a mesh; the gradients averaged over all."""
    if mesh is None:
        return _part(trained, given, fed, step, accumulate=accumulate)
    axes, spread = batch_axes(mesh), mesh.shape.get("fsdp", 1)
    others = tuple(a for a in axes if a != "fsdp")
    arrays, static = eqx.partition((trained, given), eqx.is_array)
    params = eqx.filter(trained, eqx.is_inexact_array)
    # From the whole shapes: inside, an array is one device's part.
    dims, param_dims = _dimensions(trained, mesh), _dimensions(params, mesh)

    def specs(tree):
        return jax.tree.map(lambda s: s.spec, parameter_sharding(tree, mesh))

    def average(g, dim):
        if dim < 0:
            return jax.lax.pmean(g, axes)
        # The gather's transpose has summed over "fsdp" already.
        return (jax.lax.pmean(g, others) if others else g) / spread

    def per_device(arrays, fed, step):
        arguments = *eqx.combine(arrays, static), fed, step
        options = {"accumulate": accumulate, "axes": axes, "dims": dims}
        value, grads, aux = _part(*arguments, **options)
        return value, jax.tree.map(average, grads, param_dims), aux

    ins = (specs(arrays[0]), P()), P(axes), P()
    outs = P(), specs(params), P()
    split = jax.shard_map(
        per_device, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False
    )
    return split(arrays, fed, step)
