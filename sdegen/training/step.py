"""The state of training and the pure step that changes it.

The batch, the noise and the times of step n are functions of the seed and n alone. Our
convolutions, and Diffrax, need `shard_map(check_vma=False)`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from ..losses.coupling.pairs import split_aux
from ..losses.per_sample import part_of_batch
from ..models.model import AbstractModel
from ..typing import AxisName, PyTree, RandomKey, Scalar, ScalarLike
from . import ema
from .ema import DECAY, AbstractAverage, as_averages
from .optimizer import at_least_float32, global_norm, like_dtypes


class TrainState(eqx.Module):
    """`model.trained`, its averages, the state of the optimiser, the step.

    Averages are float32 at least: in bfloat16 they would not move.
    """

    trained: Any
    averages: tuple[Any, ...]
    opt_state: PyTree
    step: Int[Array, ""]


def init_state(
    trained: Any, transform: optax.GradientTransformation, *, averages: int = 1
) -> TrainState:
    """The state before the first step; every moving average starts at `trained`.

    **Arguments:**
    - `trained`: `model.trained`.
    - `transform`: an Optax transformation.
    - `averages`: how many moving averages are kept; 1.
    """
    params = eqx.filter(trained, eqx.is_inexact_array)
    if not jax.tree.leaves(params):
        raise ValueError("the network has no floating-point arrays: nothing to train.")

    # The state's buffers are donated, the model's stay the caller's.
    copies = tuple(at_least_float32(copied(trained)) for _ in range(averages))
    return TrainState(copied(trained), copies, transform.init(params), jnp.array(0))


def copied(tree: Any) -> Any:
    """`tree` with copies of its arrays."""
    return jax.tree.map(lambda a: jnp.copy(a) if eqx.is_array(a) else a, tree)


def own_loss(model, key, x0, cond=None, *, axis_name=None):
    """The model's own loss."""
    return model.loss(key, x0, cond, axis_name=axis_name)


def check_model(model: Any) -> None:
    """Refuse what is no model, with a sentence."""
    if not isinstance(model, AbstractModel):
        raise ValueError(
            "training takes an sdegen.AbstractModel, such as sdegen.Denoiser(network, "
            f"path), which says what of it is trained and how, got {model!r:.60}."
        )
    variables = jax.tree.leaves_with_path(
        model.trained, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )
    for place, variable in variables:
        if isinstance(variable, nnx.BatchStat | nnx.RngState | nnx.Cache):
            raise ValueError(
                "training changes parameters alone, but the network has a state that "
                f"moves with its calls: network{jax.tree_util.keystr(place)}, an nnx."
                f"{type(variable).__name__}. In the place of nnx.BatchNorm take a norm "
                "without running statistics, such as nnx.GroupNorm; in the place of "
                "nnx.Dropout take dropout= of sdegen.nets, or draw from the parameter "
                "`key` of the network's call, which only training gives."
            )


def without_trained(model: AbstractModel) -> AbstractModel:
    """The model without the arrays that training changes; `with_trained` adds them."""

    def fields(model):
        return [getattr(model, name) for name in model.trainable]

    # Only arrays become None: the rest still knows what of it is trained.
    static = eqx.filter(fields(model), eqx.is_array, inverse=True)
    return eqx.tree_at(fields, model, static)


def gradients(
    trained: Any,
    model: AbstractModel,
    x0: Float[Array, "batch ..."],
    cond: PyTree,
    key: RandomKey,
    *,
    loss: Callable | None = None,
    axis_name: AxisName | None = None,
    accumulate: int = 1,
) -> tuple[Scalar, PyTree, dict[str, Scalar]]:
    """The loss on a batch and its gradient.

    **Arguments:**
    - `trained`: what training changes, in the place of `model.trained`.
    - `model`: the model, or what `without_trained` leaves of it.
    - `x0`, `cond`: data (batch, ...), and conditions or None.
    - `key`: the key of the batch.
    - `loss`: a function (model, key, x0, cond, *, axis_name); the model's own.
    - `axis_name`: the mapped axis, if the batch is one device's part; none.
    - `accumulate`: parts that the batch is computed in, one after the other; 1. Sample
      i draws the same numbers in any number of parts, if the loss asks `batch_index`
      for its place, as those of sdegen do. Another loss gets fold_in(key, j) in part j.
      Couplings pair within a part.

    **Returns:** (loss, gradient, aux), `aux` that of the coupling or {}. With
    `axis_name` the loss is the mean over all devices and the gradient this device's:
    its mean over the devices is the gradient.
    """
    loss = own_loss if loss is None else loss

    def part(trained, x0, cond, key):
        full = model.with_trained(trained)
        out = split_aux(loss(full, key, x0, cond, axis_name=axis_name))
        # The mean belongs inside: where autodiff sums gradients of replicated arrays
        # by itself (shard_map with its checks) it then sums the right thing.
        return out if axis_name is None else jax.lax.pmean(out, axis_name)

    def grad(*arguments):
        (value, aux), slope = eqx.filter_value_and_grad(part, has_aux=True)(*arguments)
        return value, slope, aux

    if accumulate == 1:
        return grad(trained, x0, cond, key)

    def split(a):  # (batch, ...) -> (k, batch / k, ...), the same on any mesh
        return a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1)

    pieces = jax.tree.map(split, (x0, cond))
    with part_of_batch(0, accumulate) as seen:
        first = jax.tree.map(lambda a: a[0], pieces)
        shapes = eqx.filter_eval_shape(grad, trained, *first, key)

    def body(total, piece):
        j, x0, cond = piece
        own = key if seen.asked else jax.random.fold_in(key, j)
        with part_of_batch(j, accumulate):
            new = at_least_float32(grad(trained, x0, cond, own))
        return jax.tree.map(lambda a, b: a + b / accumulate, total, new), None

    def zero(s):
        kind = s.dtype
        if jnp.issubdtype(kind, jnp.inexact):
            kind = jnp.promote_types(kind, jnp.float32)
        return jnp.zeros(s.shape, kind)

    pieces = (jnp.arange(accumulate), *pieces)
    return jax.lax.scan(body, jax.tree.map(zero, shapes), pieces)[0]


def apply_gradients(
    state: TrainState,
    value: Scalar,
    grads: PyTree,
    transform: optax.GradientTransformation,
    averages: Sequence[AbstractAverage],
    aux: Mapping[str, Scalar] = {},  # noqa: B006
) -> tuple[TrainState, dict[str, Scalar]]:
    """The next state, and `loss`, `grad_norm`, `update_norm` and `aux`."""
    params = eqx.filter(state.trained, eqx.is_inexact_array)
    updates, opt_state = transform.update(grads, state.opt_state, params)
    # What is kept keeps its type, whatever the numbers of the optimiser are.
    opt_state = like_dtypes(opt_state, state.opt_state)
    trained = like_dtypes(eqx.apply_updates(state.trained, updates), state.trained)
    n = (state.step + 1).astype(jnp.float32)
    moving = ema.update(averages, state.averages, trained, n)
    norms = {"grad_norm": global_norm(grads), "update_norm": global_norm(updates)}
    new = TrainState(trained, moving, opt_state, state.step + 1)
    return new, {"loss": value, **norms, **aux}


def train_step(
    state: TrainState,
    model: AbstractModel,
    transform: optax.GradientTransformation,
    x0: Float[Array, "batch ..."],
    cond: PyTree,
    key: RandomKey,
    *,
    loss: Callable | None = None,
    ema: ScalarLike | AbstractAverage | Sequence | None = DECAY,
    axis_name: AxisName | None = None,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, Scalar]]:
    """One step, pure: (state, batch) -> (state, metrics).

    **Arguments:**
    - `state`: of `init_state`, or of the step before.
    - `model`: the model, whose trained part is replaced by the state's.
    - `transform`: the Optax transformation of the state.
    - `x0`, `cond`, `loss`, `axis_name`, `accumulate`: see `gradients`.
    - `key`: the key of the run: step n uses fold_in(key, n).
    - `ema`: a decay or an average of `sdegen.ema`, or as many as the state has.

    **Returns:** the next state, and a dict of `loss`, `grad_norm`, `update_norm` and
    the `aux` of the coupling.
    """
    here = jax.random.fold_in(key, state.step)
    options = {"loss": loss, "axis_name": axis_name, "accumulate": accumulate}
    value, grads, aux = gradients(state.trained, model, x0, cond, here, **options)
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
    return apply_gradients(state, value, grads, transform, as_averages(ema), aux)
