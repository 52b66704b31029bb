"""From noise to data: `sample` draws from any model."""

import diffrax as dfx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

from ..models.model import AbstractModel, conditions
from ..models.problem import noise_level
from ..solvers.grids import Adaptive, Grid
from ..solvers.solve import Solution
from ..typing import PyTree, ScalarLike, Seed
from .drive import drive, whole_numbers


def sample(
    key: Seed,
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
    - `key`: a typed random key, or a seed.
    - `model`: a denoiser, or any model that says how it is sampled.
    - `shape`: (batch, ...).
    - `solver`: one of `sdegen.solvers`, or any Diffrax solver. Default for a denoiser:
      that of a learned grid, or UniPC of order 2 in velocity for the flow and Heun for
      the SDE, with adaptive steps ExponentialAdams and ShARK; for an equation of its
      own Heun and Euler-Maruyama.
    - `grid`: a grid such as `CosineGrid(32)`, a number of steps, an array of times that
      fall from t_max to t_min, or `Adaptive(rtol, atol)`. Default: 32 steps for a
      denoiser, 200 for an equation. A last time of 0, where sigma is 0, is the denoised
      point of the time before it.
    - `stochasticity`: the noise level lambda: 0 is the probability flow (the default),
      1 the reverse SDE of Anderson.
    - `cond`: conditions, a pytree of arrays with leading axis batch; none by default.
    - `start`: the state at the first time, (batch, ...); drawn by default.
    - `denoise`: return E[x0 given x] at the end; no, or as the grid was learned.
    - `trajectory`: keep the states on the way; no by default.
    - `refinable`: drive every number of steps by the same Brownian path, so that more
      steps give the same sample, better solved (slower; no by default).
    - `sharding`: how to split the batch over devices, in equal parts, each with
      adaptive steps of its own; none by default.

    **Returns:** a `Solution`; a solve never raises on the device: look at `.ok`.

    **Raises:** a ValueError for arguments that do not fit the model.
    """
    shape = whole_numbers(shape)
    if not isinstance(model, AbstractModel):
        raise ValueError(
            "sample takes a model, such as Denoiser(network, sdegen.VP()), got "
            f"{model!r:.60}."
        )
    start = None if start is None else jnp.asarray(start)
    cond = conditions(model, cond, shape[0])
    same = {"cond": cond, "start": start, "refinable": refinable}
    problem = model.problem(
        shape,
        solver=solver,
        grid=grid,
        stochasticity=noise_level(stochasticity),
        denoise=denoise,
        **same,
    )
    return drive(key, problem, shape, trajectory=trajectory, sharding=sharding, **same)
