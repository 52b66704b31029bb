"""The verbs of every corruption system: corrupt a batch, train a network, sample.

Sample i of a call draws from fold_in(key, i), its step n from fold_in of that, as in
`sdegen.sample`: the DDIM of both draws the same numbers.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from ..typing import (
    AxisName,
    PyTree,
    RandomKey,
    Scalar,
    ScalarLike,
    Time,
    float_array,
    is_traced,
)
from .corruption import AbstractCorruption


class Restorer(eqx.Module):
    """A network `(t, x, cond) -> prediction` on batches, and the system it restores.

    The network is any callable pytree; it gets its times as (batch,), in the system's
    own clock. Its prediction has the shape of x; for tokens one axis more, the logits.
    `fit` trains it with `loss=restoration_loss`.
    """

    network: Any
    system: AbstractCorruption

    def __call__(
        self, t: Time, x: Num[Array, "batch ..."], cond: PyTree = None
    ) -> Float[Array, "batch ..."]:
        """The prediction at times t, () or (batch,)."""
        out = self.network(jnp.broadcast_to(t, x.shape[:1]), x, cond)
        if out.shape[: x.ndim] != x.shape:
            raise ValueError(
                "the network of a Restorer must predict an array of the shape of x, or "
                f"logits (batch, length, vocabulary): x has shape {x.shape}, the "
                f"prediction {out.shape}."
            )
        return out


class Chain(eqx.Module):
    """Where a chain ended: `x`, (batch, ...), after `evaluations` network calls.

    `times` and `trajectory`, (times, batch, ...), are the states along the way, from
    the start to the end, or None.
    """

    x: Num[Array, "batch ..."]
    evaluations: Int[Array, ""]
    times: Float[Array, " times"] | None = None
    trajectory: Num[Array, "times batch ..."] | None = None

    @property
    def ok(self) -> Array:
        """Whether all of x is finite."""
        return jnp.isfinite(self.x).all()


def corrupt(
    key: RandomKey,
    system: AbstractCorruption,
    t: ScalarLike,
    x0: Num[Array, "batch ..."] | np.ndarray,
) -> Num[Array, "batch ..."]:
    """A batch of data at time t; sample i draws from fold_in(key, i)."""
    return _corrupt(system, key, jnp.arange(len(x0)), float_array(t), jnp.asarray(x0))


@eqx.filter_jit
def _corrupt(system, key, index, t, x0):
    """Sample i at time t[i] or t, with fold_in(key, index[i]); floats keep theirs."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    x = jax.vmap(system.corrupt, (0, 0 if t.ndim else None, 0))(keys, t, x0)
    floats = all(jnp.issubdtype(a.dtype, jnp.floating) for a in (x, x0))
    return x.astype(x0.dtype) if floats else x


def restoration_loss(
    restorer: Restorer,
    key: RandomKey,
    x0: Num[Array, "batch ..."],
    cond: PyTree = None,
    *,
    axis_name: AxisName | None = None,
) -> Scalar:
    """The mean of the system's `error` on a batch, at stratified training times.

    For `Mask` it is the bound of its module in nats per token. Tokens come as whole
    numbers, also in floating point (the only kind that `fit` takes); float32 holds them
    exactly up to 2^24. `axis_name` is as in `denoising_loss`.
    """
    system, shape = restorer.system, x0.shape[1:]
    index, total = jnp.arange(len(x0)), len(x0)
    if axis_name is not None:
        index = index + total * jax.lax.axis_index(axis_name)
        total = total * jax.lax.axis_size(axis_name)
    floats = jnp.issubdtype(x0.dtype, jnp.floating)
    dtype = jnp.promote_types(x0.dtype if floats else jnp.float32, jnp.float32)
    time_key, noise_key = jax.random.split(key)
    u = (jax.random.uniform(time_key, (), dtype) + index.astype(dtype)) / total
    tiny = jnp.finfo(dtype).eps
    t = jax.vmap(system.training_time, (0, None))(jnp.clip(u, tiny, 1 - tiny), shape)
    x = _corrupt(system, noise_key, index, t, x0)
    return jnp.mean(jax.vmap(system.error)(t, x0, x, restorer(t, x, cond)))


def sample(
    key: RandomKey,
    restorer: Restorer,
    shape: tuple[int, ...],
    *,
    steps: int | Float[Array | np.ndarray, " times"] | None = None,
    cond: PyTree = None,
    start: Num[Array, "batch ..."] | None = None,
    trajectory: bool = False,
) -> Chain:
    """Draw `shape[0]` samples by the chain of the system, one network call per step.

    **Arguments:** `shape`, (batch, ...), for tokens (batch, length); `steps`, a number
    (default: the system's), or an array of falling times; `cond`, a pytree with leading
    axis batch; `start`, states at the first time in place of the system's prior, for
    instance data to be restored; `trajectory`, keep the states along the way.
    """
    shape = tuple(shape)
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            "sample needs a shape (batch, ...) with at least two axes, got "
            f"{shape}. For tokens use (batch, length)."
        )
    if steps is None or isinstance(steps, int | np.integer):
        times = restorer.system.times(steps, shape[1:])
    else:
        times = float_array(steps)
        if times.ndim != 1 or len(times) < 2:
            raise ValueError(
                "steps is a number, or an array of at least two falling times, got an "
                f"array of shape {times.shape}."
            )
        if not is_traced(times) and not bool((jnp.diff(times) < 0).all()):
            raise ValueError("steps, as an array, must hold times that fall.")
    if start is not None:
        start = jnp.asarray(start)
        if start.shape != shape:
            raise ValueError(f"start must have the shape {shape}, got {start.shape}.")
    return _sample(key, restorer, cond, start, times, shape, trajectory)


@eqx.filter_jit
def _sample(key, restorer, cond, start, times, shape, trajectory):
    system = restorer.system
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shape[0]))
    start_keys, step_keys = jax.vmap(lambda k: tuple(jax.random.split(k)))(keys)
    if start is None:
        draw = lambda k: system.prior(k, shape[1:], times.dtype)  # noqa: E731
        start = jax.vmap(draw)(start_keys)

    def step(x, row):
        i, t, s = row
        prediction = restorer(t, x, cond)
        own = jax.vmap(jax.random.fold_in, (0, None))(step_keys, i)
        revert = jax.vmap(system.revert, (0, None, None, 0, 0))
        x = revert(own, s, t, x, prediction).astype(x.dtype)
        return x, x if trajectory else None

    steps = len(times) - 1
    x, frames = jax.lax.scan(step, start, (jnp.arange(steps), times[:-1], times[1:]))
    if trajectory:
        frames = jnp.concatenate([start[None], frames])
    return Chain(x, jnp.array(steps), times if trajectory else None, frames)
