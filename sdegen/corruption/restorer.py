"""Restorers: a network with the corruption that it undoes, as a model."""

from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from ..losses.batch import Batch
from ..losses.coupling.pairs import independent
from ..losses.per_sample import batch_index, sample_keys
from ..models.model import AbstractModel
from ..models.problem import AbstractProblem, Table
from ..solvers.grids import whole_steps
from ..typing import (
    AxisName,
    PyTree,
    RandomKey,
    Scalar,
    ScalarLike,
    Seed,
    Time,
    float_array,
    is_traced,
    random_key,
)
from .corruption import AbstractCorruption


class Restorer(AbstractModel):
    """A network with the corruption system that it restores.

    `sample` runs the chain of the system, one network call per step. Its `grid` is a
    number of steps (by default the system's own) or an array of falling times.

    **Arguments:**
    - `network`: a callable pytree (t, x, cond) -> prediction on batches, with t of
      shape (batch,), of the shape of x; for tokens one axis more, the logits.
    - `system`: the corruption.
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
                f"logits: x has shape {x.shape}, the prediction {out.shape}."
            )
        return out

    def loss(self, key, x0, cond=None, *, axis_name=None):
        """`restoration_loss`."""
        return restoration_loss(self, key, x0, cond, axis_name=axis_name)

    def draw_batch(
        self, key, x0, cond=None, *, coupling=independent, times=None, axis_name=None
    ):
        """Corrupted data at stratified times of the system; the target is x0."""
        if coupling is not independent or times is not None:
            raise ValueError(
                "a Restorer trains at the times of its system, without a coupling: "
                "leave coupling and times out."
            )
        index, total = batch_index(len(x0), axis_name)
        floats = jnp.issubdtype(x0.dtype, jnp.floating)
        dtype = jnp.promote_types(x0.dtype if floats else jnp.float32, jnp.float32)
        time_key, noise_key = jax.random.split(key)
        u = (jax.random.uniform(time_key, (), dtype) + index.astype(dtype)) / total
        u = jnp.clip(u, jnp.finfo(dtype).eps, 1 - jnp.finfo(dtype).eps)
        t = jax.vmap(self.system.training_time, (0, None))(u, x0.shape[1:])
        x = _corrupt(self.system, noise_key, index, t, x0)
        keys = sample_keys(jax.random.fold_in(key, 2), index)
        return Batch(t, x, x0, x0, None, None, cond, keys, {})

    def problem(
        self, shape, *, solver, grid, stochasticity, denoise, refinable, cond, start
    ):
        """The chain of the system; see `AbstractModel.problem`."""
        if solver is not None or stochasticity is not None or denoise or refinable:
            raise ValueError(
                "a Restorer takes no solver, stochasticity, denoise and refinable: it "
                f"runs the chain of {type(self.system).__name__}, which sets the noise."
            )
        count = whole_steps(grid, "sample")
        if grid is None or count is not None:
            times = self.system.times(count, shape[1:])
        else:
            times = _falling(grid)
        draw = lambda k: self.system.prior(k, shape[1:], times.dtype)  # noqa: E731
        state = jax.eval_shape(draw, jax.random.key(0)) if start is None else start
        return ChainProblem(self, times, jnp.zeros((), state.dtype), start is not None)


def _falling(grid):
    times = jnp.zeros(()) if callable(grid) else float_array(grid)
    several = times.ndim == 1 and len(times) > 1
    if not several or not (is_traced(times) or (jnp.diff(times) < 0).all()):
        raise ValueError(
            "the grid of a chain is a number of steps, or an array of at least two "
            f"times that fall, got {grid!r:.80}."
        )
    return times


class Iterate(dfx.Euler):
    """y1 = f(t0, y0): every step is the map itself, one evaluation as Euler's."""

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step, as Diffrax asks for it."""
        y1 = terms.vector_field(t0, y0, args)  # pyright: ignore[reportAttributeAccessIssue]
        return y1, None, {"y0": y0, "y1": y1}, None, dfx.RESULTS.successful


class ChainProblem(AbstractProblem):
    """The steps of a chain, on a clock that counts them."""

    restorer: Restorer
    grid: Float[Array, " times"]
    zero: Num[Array, ""]  # of the dtype of the state
    given: bool = eqx.field(static=True)  # whether the start is
    solver: dfx.AbstractSolver = Iterate()
    draws_start: ClassVar = True

    def table(self):
        """The times, and as rows each time with the number of its step."""
        number = jnp.arange(len(self.grid))
        return Table(number.astype(self.grid.dtype), self.grid, (self.grid, number))

    def start(self, table, key, shape):
        """A draw of the prior, which a given start need not have."""
        if self.given:
            return jnp.zeros(shape, self.zero.dtype)
        return self.restorer.system.prior(key, shape, self.grid.dtype)

    def encode(self, table, x):
        """The states as they are given."""
        return x.astype(self.zero.dtype)

    def equation(self, table, keys, cond, shape, refinable):
        """The step from t to s of a batch, for `Iterate`."""

        def step(clock, x, args):
            (t, number), (s, _) = args.rows
            prediction = self.restorer(t, x, cond)
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            revert = jax.vmap(self.restorer.system.revert, (0, None, None, 0, 0))
            return revert(own, s, t, x, prediction).astype(x.dtype)

        return step, None

    def times(self, clock):
        """The times of points of the clock."""
        return jnp.interp(clock, jnp.arange(len(self.grid)), self.grid)

    def decode(self, t, y):
        """The states."""
        return y


def corrupt(
    key: Seed,
    system: AbstractCorruption,
    t: ScalarLike,
    x0: Num[Array, "batch ..."] | np.ndarray,
) -> Num[Array, "batch ..."]:
    """Data at time t of a corruption, (batch, ...).

    **Arguments:**
    - `key`: a random key; sample i draws from fold_in(key, i).
    - `system`: the corruption.
    - `t`: the time, one for all.
    - `x0`: data, (batch, ...).
    """
    return _corrupt(
        system, random_key(key), jnp.arange(len(x0)), float_array(t), jnp.asarray(x0)
    )


@eqx.filter_jit
def _corrupt(system, key, index, t, x0):
    """Sample i at time t[i] or t, with fold_in(key, index[i]); floats keep theirs."""
    keys = sample_keys(key, index)
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

    For `Mask` it is the bound of its module in nats per token. The arguments are those
    of `denoising_loss`; tokens are whole numbers, in floating point for `fit`.
    """
    batch = restorer.draw_batch(key, x0, cond, axis_name=axis_name)
    prediction = restorer(batch.t, batch.x_t, cond)
    error = jax.vmap(restorer.system.error)
    return jnp.mean(error(batch.t, x0, batch.x_t, prediction))
