"""From noise to data: the probability flow, and every reverse SDE, of any path.

A path x = alpha x0 + sigma z becomes, with y = x / (alpha + sigma) and the flow time
tau = sigma / (alpha + sigma), the rectified flow y = (1 - tau) x0 + tau z. There

    dy = (z_hat - x0_hat) dtau                                                      (1)

is the probability flow of every path: no alpha', sigma', division by alpha or by sigma.
Euler's method on (1) is DDIM (Song et al. 2021, "Denoising diffusion implicit models")
for any process and any grid, and the higher orders inherit its exactness on point
masses. The clock is u = 1 - tau, which rises.

The stochastic family with the same marginals (equation (4) of `sde`) is regular in the
clock l = log(alpha / sigma), where g^2 |dt| = 2 sigma^2 dl, with noise strength lambda:

    dy = tau [(1 - tau)(x0_hat - z_hat) - lambda^2 z_hat] dl
         + lambda tau sqrt(2) dW                                                    (2)

Noise is additive, so Euler, Heun, SRA1 and ShARK apply, and Ito equals Stratonovich.

The solvers of `sdegen.solvers` see the same two equations as one `SemilinearTerm`, in
the clock c = -log tau.
"""

import operator

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..models.denoiser import AbstractDenoiser
from ..models.generator import AbstractGenerator
from ..processes import prediction
from ..processes.path import LOGSNR_FLOOR, NoiseInverse, basis_of, check_sample
from ..solvers.adams import ExponentialAdams
from ..solvers.grids import (
    Adaptive,
    CosineGrid,
    FlowTimeGrid,
    Grid,
    LogSNRGrid,
    check_grid,
)
from ..solvers.semilinear import SemilinearTerm
from ..solvers.solve import (
    Solution,
    brownian_path,
    check_solver,
    checked,
    evaluations,
    solve,
    spread,
)
from ..solvers.solver import AbstractSemilinearSolver
from ..solvers.sscs import BackwardTerm
from ..solvers.unipc import UniPC
from ..typing import PyTree, RandomKey, ScalarLike, float_array, is_traced
from .generate import generate


def sample(
    key: RandomKey,
    denoiser: AbstractDenoiser | AbstractGenerator,
    shape: tuple[int, ...],
    *,
    solver: dfx.AbstractSolver | None = None,
    grid: Grid | Adaptive | Array | int | None = None,
    stochasticity: ScalarLike = 0.0,
    cond: PyTree = None,
    start: Float[Array, "batch ..."] | None = None,
    denoise: bool | None = None,
    trajectory: bool = False,
    refinable: bool = False,
    sharding: jax.sharding.Sharding | None = None,
) -> Solution:
    """Draw `shape[0]` samples; sample i depends on (key, i), not on the batch or mesh.

    A generator (`sdegen.generator`) runs its own equation on a clock from 0 to 1, by
    Heun or Euler-Maruyama with 200 steps, unless a solver and a grid say otherwise.

    **Arguments:** `shape`, (batch, ...); `solver`, one of `sdegen.solvers` or any
    Diffrax solver (default: that of a learned grid, or UniPC of order 2 in velocity for
    the flow and Heun for the SDE, with adaptive steps ExponentialAdams and ShARK);
    `grid`, a grid of `sdegen.times`, an array of times that fall from t_max to t_min, a
    number of steps, or `Adaptive(rtol, atol)` (default: 32 steps); `stochasticity`,
    lambda in (2): 0 is the probability flow, 1 the reverse SDE of Anderson; `cond`, a
    pytree with leading axis batch; `start`, x at the first time instead of noise;
    `denoise`, return E[x0 given x] at the end, for one evaluation more (default: no, or
    as the grid was learned); `trajectory`, keep the states along the way; `refinable`,
    drive every number of steps by the same Brownian path, so that more steps give the
    same sample, better solved (slower: see docs/choosing-a-solver.md); `sharding`, how
    to split the batch over devices, in equal parts. With it adaptive steps are chosen
    by each device for its share of the batch.

    **Returns:** a `Solution`: `x`, `evaluations`, `result` (check `.ok` on the host; a
    solve never raises on the device), and with `trajectory` the frames and their times.

    On paths that reach alpha = 0 Diffrax's SDE solvers start at alpha / sigma = 1e-3,
    where (2) begins; those of `sdegen.solvers` start at alpha = 0.
    """
    given, shape = shape, _whole_numbers(shape)
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            "sample needs a shape (batch, ...) of whole numbers with at least two "
            f"axes, got {given!r}. For 1-D data use (batch, 1)."
        )
    if jnp.ndim(stochasticity):
        raise ValueError(
            "stochasticity is one number for the whole batch, got an array of shape "
            f"{jnp.shape(stochasticity)}."
        )
    flow = not is_traced(stochasticity) and float(stochasticity) == 0
    if not is_traced(stochasticity) and not float(stochasticity) >= 0:
        raise ValueError(
            "stochasticity must be >= 0 (0 is the flow, 1 the reverse SDE), got "
            f"{float(stochasticity):g}."
        )
    if isinstance(denoiser, AbstractGenerator):
        if denoise or refinable:
            raise ValueError(
                "denoise and refinable are for a denoiser on a path, and "
                f"{type(denoiser).__name__} runs an equation of its own. Leave them "
                "out; a finer grid ends nearer to the data."
            )
        return generate(
            key,
            denoiser,
            shape,
            solver=solver,
            grid=grid,
            stochasticity=None if flow else float_array(stochasticity),
            cond=cond,
            start=start,
            trajectory=trajectory,
            sharding=sharding,
        )
    path = denoiser.path
    check_sample(path, shape[1:])
    if solver is None:
        solver = getattr(grid, "solver", None) or _default(grid, flow, denoiser)
    if getattr(solver, "term_structure", None) is BackwardTerm:
        raise ValueError(
            f"{type(solver).__name__} moves a whole state, position and velocity: call "
            "sample(key, sdegen.Augmented(denoiser), shape, solver=...)."
        )
    check_solver(solver, isinstance(grid, Adaptive), not flow)
    semilinear = isinstance(solver, AbstractSemilinearSolver)
    if semilinear and not flow and not is_traced(stochasticity):
        if float(stochasticity) > solver.family:
            raise ValueError(
                f"{type(solver).__name__} takes a stochasticity from 0 to "
                f"{solver.family:g}, got {float(stochasticity):g}. DPMSolverSDE() and "
                "ERSDE() take any."
            )
    noisy = not flow or (semilinear and solver.draws)
    if noisy and not path.noise.gaussian:
        raise ValueError(
            f"the reverse SDE needs Gaussian noise, and {type(path).__name__} has noise="
            f"{type(path.noise).__name__}. Sample with stochasticity=0 and a solver "
            "that draws none."
        )
    if grid is None or isinstance(grid, int):
        # Each in the clock that it is solved in, where equal steps serve it best.
        steps = 32 if grid is None else grid
        if semilinear and flow:
            grid = CosineGrid(steps, _size(denoiser))
        else:
            grid = (FlowTimeGrid if flow else LogSNRGrid)(steps)
    if start is not None:
        start = jnp.asarray(start)
        if start.shape != shape:
            raise ValueError(f"start must have the shape {shape}, got {start.shape}.")
    if refinable and (flow or (semilinear and solver.draws)):
        reason = "draws its own" if noisy else "solves the flow, which has none"
        raise ValueError(
            "refinable noise is that of the reverse SDE, stochasticity > 0; here "
            f"{type(solver).__name__} {reason}."
        )
    if denoise is None:
        denoise = getattr(grid, "denoise", False)
    _check_sharding(sharding, shape)
    grid = check_grid(grid, path)
    return _sample(
        key,
        denoiser,
        cond,
        start,
        grid,
        None if flow else float_array(stochasticity),
        solver,
        shape,
        denoise,
        trajectory,
        refinable,
        sharding,
    )


def _check_sharding(sharding, shape):
    if sharding is None:
        return
    try:
        sharding.shard_shape(shape[:1])
    except ValueError:
        raise ValueError(
            f"sharding must split the batch axis alone, in equal parts, got {sharding} "
            f"for a batch of {shape[0]}. Use sdegen.mesh.batch_sharding(mesh)."
        ) from None


def _check_steps(solver, steps):
    """Learned weights are for one number of steps."""
    wanted = getattr(solver, "steps", None)
    if wanted not in (None, steps):
        raise ValueError(
            f"the weights of this {type(solver).__name__} were learned for {wanted} "
            f"steps, got a grid of {steps} steps. Use the grid that they were learned "
            "with."
        )


def _default(grid, flow, denoiser) -> dfx.AbstractSolver:
    if isinstance(grid, Adaptive):
        return ExponentialAdams(sigma_data=_size(denoiser)) if flow else dfx.ShARK()
    return UniPC(2, prediction=prediction.velocity) if flow else dfx.Heun()


def _size(denoiser) -> Array:
    """The standard deviation of the data over all coordinates, 0.5 if not known."""
    size = float_array(getattr(denoiser, "sigma_data", 0.5))
    return size if size.ndim == 0 else jnp.sqrt(jnp.mean(size**2))


def _whole_numbers(shape) -> tuple[int, ...]:
    try:
        return tuple(operator.index(n) for n in shape)
    except TypeError:
        return ()


class _FlowField(eqx.Module):
    """The right-hand side of (1) in the clock u = 1 - tau."""

    denoiser: AbstractDenoiser
    inverse: NoiseInverse
    cond: PyTree

    def __call__(self, u, y, args):
        c = -jnp.log1p(-u)
        t, path = self.inverse(c), self.denoiser.path
        x0, z = self.denoiser.posterior_means(
            t, (path.alpha(t) + path.sigma(t)) * y, self.cond
        )
        rate = self.inverse.local_rate(c)
        if isinstance(rate, float):
            return x0 - z
        # du_i / du where every coordinate has a clock of its own
        return jnp.exp(c - self.inverse.local(c)) * rate * (x0 - z)


class _ReverseField(eqx.Module):
    """The drift and the noise of (2) in the clock l = log(alpha / sigma)."""

    denoiser: AbstractDenoiser
    inverse: NoiseInverse
    cond: PyTree
    stochasticity: Array

    def __call__(self, l, y, args):
        t, (tau, rate) = self.inverse(jax.nn.softplus(l)), self._local(l)
        path = self.denoiser.path
        x0, z = self.denoiser.posterior_means(
            t, (path.alpha(t) + path.sigma(t)) * y, self.cond
        )
        return rate * tau * ((1 - tau) * (x0 - z) - self.stochasticity**2 * z)

    def noise(self, l, y, args):
        tau, rate = self._local(l)
        return self.stochasticity * tau * jnp.sqrt(2 * rate).astype(l.dtype)

    def _local(self, l):
        """tau and dl_i / dl in every coordinate; the latter is 1 for scalars."""
        c = jax.nn.softplus(l)
        rate = self.inverse.local_rate(c)
        if isinstance(rate, float):
            return jax.nn.sigmoid(-l), rate
        own = self.inverse.local(c)
        return jnp.exp(-own), rate * jax.nn.sigmoid(l) / -jnp.expm1(-own)


@eqx.filter_jit
def _sample(
    key,
    denoiser,
    cond,
    start,
    grid,
    stochasticity,
    solver,
    shape,
    denoise,
    trajectory,
    refinable,
    sharding,
):
    path, inverse = denoiser.path, denoiser.path.inverse()
    basis = basis_of(path)
    adaptive = grid if isinstance(grid, Adaptive) else None
    if adaptive is not None:
        ts = jnp.stack([float_array(path.t_max), float_array(path.t_min)])
    else:
        ts = grid(path) if callable(grid) else grid
        _check_steps(solver, len(ts) - 1)
    dtype = ts.dtype
    alpha, sigma = jax.vmap(path.level)(ts)
    if stochasticity is not None:
        stochasticity = stochasticity.astype(dtype)
    first, last = path.scales(ts[0]), path.scales(ts[-1])
    tau0 = first[1] / sum(first)
    if isinstance(solver, AbstractSemilinearSolver):
        clock, time = jnp.log1p(alpha / sigma), inverse
    elif stochasticity is None:
        clock, time = alpha / (alpha + sigma), lambda u: inverse(-jnp.log1p(-u))
    else:
        clock, time = (
            jax.vmap(path.logsnr)(ts) / 2,
            lambda l: inverse(jax.nn.softplus(l)),
        )
        # Nodes below the floor become one: steps of length zero, which change nothing.
        clock = jnp.maximum(clock, LOGSNR_FLOOR / 2)
        tau0 = jnp.exp(-inverse.local(jax.nn.softplus(clock[0])))

    def run(y0, keys, cond):
        """Solve for these samples: (states, their clock, steps, result)."""
        field, noise = (denoiser, inverse, cond), None
        if isinstance(solver, AbstractSemilinearSolver):
            brownian = None
            if stochasticity is not None or solver.draws:
                brownian = brownian_path(clock, keys, shape[1:], refinable=refinable)
            field = SemilinearTerm(*field, stochasticity, brownian)
        elif stochasticity is None:
            field = _FlowField(*field)
        else:
            field = _ReverseField(*field, stochasticity)
            noise = field.noise
        solution = solve(
            field,
            y0,
            clock,
            solver,
            adaptive=adaptive,
            noise=noise,
            keys=keys,
            trajectory=trajectory,
            refinable=refinable,
        )
        return solution.ys, solution.ts, solution.stats["num_steps"], solution.result

    index = jnp.arange(shape[0])
    if sharding is not None:
        index = jax.lax.with_sharding_constraint(index, sharding)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    start_keys, noise_keys = jax.vmap(lambda k: tuple(jax.random.split(k)))(keys)
    if start is None:
        draw = jax.vmap(lambda k: path.noise.sample(k, shape[1:], dtype))
        y0 = tau0 * draw(start_keys)
    else:
        y0 = basis.coordinates(start.astype(dtype)) / sum(first)
        if sharding is not None:
            y0 = jax.lax.with_sharding_constraint(y0, sharding)
    if adaptive is None:
        ys, clocks, steps, result = run(y0, noise_keys, cond)
    else:
        ys, clocks, steps, result = spread(run, adaptive, sharding)(
            y0, noise_keys, cond
        )
    times, frames = None, None
    if trajectory:
        times = ts if adaptive is None else jax.vmap(time)(clocks)
        scaled = lambda t, y: sum(path.scales(t)) * y  # noqa: E731
        frames = basis.data(jax.vmap(scaled)(times, ys))
    x = ys[-1] * sum(last)
    count = evaluations(solver, steps)
    if denoise:
        x, count = denoiser(ts[-1], x, cond), jnp.where(count < 0, count, count + 1)
    x = basis.data(x)
    return Solution(x, count, checked(result, x), times, frames)
