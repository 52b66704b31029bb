"""From noise to data: `sample` draws from any model."""

import diffrax as dfx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

from ..models.model import AbstractModel
from ..solvers.grids import Adaptive, Grid
from ..solvers.solve import Solution
from ..typing import PyTree, RandomKey, Scalar, ScalarLike, float_array, is_traced
from .drive import drive, whole_numbers


def sample(
    key: RandomKey,
    model: AbstractModel,
    shape: tuple[int, ...],
    *,
    solver: dfx.AbstractSolver | None = None,
    grid: Grid | Adaptive | Array | int | None = None,
    stochasticity: ScalarLike = 0.0,
    cond: PyTree = None,
    start: Num[Array, "batch ..."] | None = None,
    denoise: bool | None = None,
    trajectory: bool = False,
    refinable: bool = False,
    sharding: jax.sharding.Sharding | None = None,
) -> Solution:
    """Draw `shape[0]` samples; sample i depends on (key, i), not on the batch or mesh.

    **Arguments:**

    - `key`: a typed random key.
    - `model`: a denoiser, or any model that says how it is sampled.
    - `shape`: (batch, ...).
    - `solver`: one of `sdegen.solvers`, or any Diffrax solver. Default for a denoiser:
      that of a learned grid, or UniPC of order 2 in velocity for the flow and Heun for
      the SDE, with adaptive steps ExponentialAdams and ShARK. A model with an equation
      of its own takes Heun for the flow and Euler-Maruyama for the SDE.
    - `grid`: a grid such as `CosineGrid(32)`, a number of steps, an array of times that
      fall from t_max to t_min, or `Adaptive(rtol, atol)`. Default: 32 steps for a
      denoiser, 200 for an equation.
    - `stochasticity`: the noise level lambda of the reverse family: 0 is the
      probability flow (the default), 1 the reverse SDE of Anderson.
    - `cond`: conditions, a pytree of arrays with leading axis batch; none by default.
    - `start`: the state at the first time, (batch, ...); drawn by default.
    - `denoise`: return E[x0 given x] at the end, for one evaluation more. Default: no,
      or as the grid was learned.
    - `trajectory`: keep the states on the way; no by default.
    - `refinable`: drive every number of steps by the same Brownian path, so that more
      steps give the same sample, better solved (slower; no by default).
    - `sharding`: how to split the batch over devices, in equal parts. Each device then
      chooses adaptive steps for its own part.

    **Returns:** a `Solution`: `x`, `evaluations`, `result`, and with `trajectory` the
    frames and their times. A solve never raises on the device: look at `.ok` on the
    host.

    **Raises:** ValueError with a sentence for arguments that do not fit the model.

    On paths that reach alpha = 0 Diffrax's SDE solvers start at alpha / sigma = 1e-3;
    those of `sdegen.solvers` start at alpha = 0.
    """
    shape = whole_numbers(shape)
    if not isinstance(model, AbstractModel):
        raise ValueError(
            "sample takes a model, such as Denoiser(network, sdegen.VP()), got "
            f"{model!r:.60}."
        )
    start = None if start is None else jnp.asarray(start)
    problem = model.problem(
        shape,
        solver=solver,
        grid=grid,
        stochasticity=noise_level(stochasticity),
        denoise=denoise,
        refinable=refinable,
        cond=cond,
        start=start,
    )
    return drive(
        key,
        problem,
        shape,
        cond=cond,
        start=start,
        trajectory=trajectory,
        refinable=refinable,
        sharding=sharding,
    )


def noise_level(stochasticity: ScalarLike) -> Scalar | None:
    """The stochasticity as a number, None for the flow."""
    if jnp.ndim(stochasticity):
        raise ValueError(
            "stochasticity is one number for the whole batch, got an array of shape "
            f"{jnp.shape(stochasticity)}."
        )
    if is_traced(stochasticity):
        return float_array(stochasticity)
    if not float(stochasticity) >= 0:
        raise ValueError(
            "stochasticity must be >= 0 (0 is the flow, 1 the reverse SDE), got "
            f"{float(stochasticity):g}."
        )
    return None if float(stochasticity) == 0 else float_array(stochasticity)
