"""The state of training and the pure step that changes it.

A step is a function of (state, data, key): the batch, the noise and the times of step n
are functions of the seed and n alone. `train_step` is pure: jit it, scan it, or run it
under `jax.pmap` or `shard_map` given the axis name (networks with our convolutions, and
Diffrax itself, need `shard_map(check_vma=False)`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ..losses.coupling.pairs import split_aux
from ..models.model import AbstractModel
from ..typing import AxisName, PyTree, RandomKey, Scalar, ScalarLike
from . import ema
from .ema import AbstractAverage, as_averages
from .optimizer import global_norm


class TrainState(eqx.Module):
    """`model.trained`, its averages, the state of the optimiser, the step."""

    trained: Any
    averages: tuple[Any, ...]
    opt_state: PyTree
    step: Int[Array, ""]


def init_state(
    trained: Any, transform: optax.GradientTransformation, *, averages: int = 1
) -> TrainState:
    """The state before the first step; every moving average starts at `trained`."""
    params = eqx.filter(trained, eqx.is_inexact_array)

    # a copy: the state's buffers are donated, the model's stay the caller's
    def own(tree):
        return jax.tree.map(lambda a: jnp.copy(a) if eqx.is_array(a) else a, tree)

    if not jax.tree.leaves(params):
        raise ValueError("the network has no floating-point arrays: nothing to train.")
    copies = tuple(own(trained) for _ in range(averages))
    return TrainState(own(trained), copies, transform.init(params), jnp.array(0))


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


def without_trained(model: AbstractModel) -> AbstractModel:
    """The model without the arrays that training changes; `with_trained` fills them in.

    No field becomes None, so the shell knows what of it is trained.
    """
    static = eqx.partition(model.trained, eqx.is_array)[1]
    if len(model.trainable) == 1:
        static = (static,)
    return eqx.tree_at(
        lambda m: [getattr(m, name) for name in m.trainable], model, list(static)
    )


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
    """(loss, its gradient with respect to `trained`, aux), on a batch.

    `aux` is that of the loss's coupling, {} if it has none. With `axis_name` the
    batch is one device's part: the loss is the mean over all, the gradient still the
    part's, whose mean over the devices is the gradient. With `accumulate` = k the batch
    is worked off in k parts, one after the other in less memory: part j holds the
    samples i with i % k = j and uses fold_in(key, j).
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

    def body(total, piece):
        j, x0, cond = piece
        new = grad(trained, x0, cond, jax.random.fold_in(key, j))
        return jax.tree.map(lambda a, b: a + b / accumulate, total, new), None

    shapes = jax.eval_shape(grad, trained, x0, cond, key)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    pieces = (jnp.arange(accumulate), *jax.tree.map(split, (x0, cond)))
    return jax.lax.scan(body, zero, pieces)[0]


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
    trained = eqx.apply_updates(state.trained, updates)
    n = (state.step + 1).astype(jnp.float32)
    moving = ema.update(averages, state.averages, trained, n)
    new = TrainState(trained, moving, opt_state, state.step + 1)
    return new, {
        "loss": value,
        "grad_norm": global_norm(grads),
        "update_norm": global_norm(updates),
        **aux,
    }


def train_step(
    state: TrainState,
    model: AbstractModel,
    transform: optax.GradientTransformation,
    x0: Float[Array, "batch ..."],
    cond: PyTree,
    key: RandomKey,
    *,
    loss: Callable | None = None,
    ema: ScalarLike | AbstractAverage | Sequence = 0.999,
    axis_name: AxisName | None = None,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, Scalar]]:
    """One step: (state, batch) -> (state, metrics). Pure; jit it, or scan it.

    **Arguments:** `model`, whose trained part is replaced by the state's; `key`, of the
    whole run: step n uses fold_in(key, n); `loss(model, key, x0, cond, axis_name=...)`,
    default the model's own; `ema`, one decay or average, or as many as
    `state.averages` has (see `sdegen.average`); `axis_name`, the mapped axis if the batch is one device's
    part of it; `accumulate`, parts that the batch is worked off in.

    **Returns:** the next state, and `loss`, `grad_norm`, `update_norm` and the notes of
    the coupling, which the caller looks at now and then: the step itself never raises.
    """
    value, grads, aux = gradients(
        state.trained,
        model,
        x0,
        cond,
        jax.random.fold_in(key, state.step),
        loss=loss,
        axis_name=axis_name,
        accumulate=accumulate,
    )
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
    averages = as_averages(ema)
    return apply_gradients(state, value, grads, transform, averages, aux)
