"""Learning where to step: the grid, and the solver's weights, for one model.

The times of a solve, and the weights with which a multistep solver combines its
predictions, are fitted so that it ends where a fine solve from the same noise ends:

    minimise  log E |e|^2 / 2 + E log |e| / 2,     e = x_N - x_fine                  (1)

The first term is the error of the worst samples, the second that of the typical one; as
logarithms they count alike at any number of steps.
"""

import dataclasses
import functools
import json
import operator
from pathlib import Path
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from ..models.denoiser import AbstractDenoiser
from ..processes.path import basis_of, logsnr_span
from ..processes.prediction import Prediction, velocity
from ..runs.recorder import json_lines, progress_bar
from ..sampling.sample import sample
from ..solvers import DEIS, AbstractSemilinearSolver, UniPC, Weights
from ..solvers import evaluations as count
from ..solvers.grids import AbstractGrid, Adaptive, CosineGrid, between
from ..typing import PyTree, Seed, float_array, random_key
from .config import configured
from .optimizer import global_norm


class LearnedGrid(AbstractGrid):
    """Times at learned log-SNRs, with the solver that they were learned for.

    `sample` uses `solver` unless another is given; `losses` are (1) by iteration.
    """

    steps: int = eqx.field(static=True)
    half_logsnr: Float[Array, " inner"]
    solver: dfx.AbstractSolver
    denoise: bool = eqx.field(default=False, static=True)
    losses: Float[Array, " iterations"] | None = None

    def __call__(self, path):
        """The times for `path`."""
        clock = jax.nn.softplus(self.half_logsnr)
        return between(path, jax.vmap(path.inverse())(clock))

    def save(self, file: str | Path) -> Path:
        """Write the log-SNRs and weights to `file` as JSON, for `load_grid`."""
        file, names = Path(file).expanduser(), ("steps", "denoise", "half_logsnr")
        content = {"solver": _name(self.solver)} | {n: getattr(self, n) for n in names}
        weights = isinstance(self.solver, UniPC | DEIS) and self.solver.weights
        content["weights"] = jax.tree.leaves(weights) if weights else None
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json_lines([content]))
        return file


def load_grid(file: str | Path, solver: dfx.AbstractSolver) -> LearnedGrid:
    """The grid saved in `file`.

    **Arguments:**
    - `file`: of `LearnedGrid.save`.
    - `solver`: the one it was learned for; ValueError for another.
    """
    content = json.loads(Path(file).expanduser().read_text())
    if content["solver"] != _name(solver):
        raise ValueError(
            f"{file} was learned for {content['solver']}, got {_name(solver)}. Load it "
            "with the solver it was learned for."
        )
    if content["weights"] is not None:
        weights = Weights(*(float_array(np.asarray(w)) for w in content["weights"]))
        solver = _replaced(solver, "weights", weights)
    nodes = float_array(np.asarray(content["half_logsnr"]))
    return LearnedGrid(content["steps"], nodes, solver, content["denoise"])


def _name(solver) -> str:
    """The class and what it is made with, but for numbers."""
    fields = vars(solver).items()
    fixed = (f"{k}={v}" for k, v in fields if isinstance(v, int | Prediction))
    return f"{type(solver).__name__}({', '.join(fixed)})"


def _replaced(module, name, value):
    """`module` with another `value` of a field, which may be None."""
    where = operator.attrgetter(name)
    return eqx.tree_at(where, module, value, is_leaf=lambda x: x is None)


@dataclasses.dataclass(frozen=True)
class GridConfig:
    """How a grid is learned; `learn_grid` takes each field by its name, too."""

    iterations: int = 300  # steps of Adam
    rate: float = 0.03  # its learning rate, which falls to 0 along a half cosine
    kept: int = 512  # starts trained on, half of them those a stock grid solves worst
    weights: bool = True  # learn the weights too, if it has any (`DEIS`, `UniPC`)
    tolerance: float | None = None  # of the fine solve; 1e-5, or 1e-9 in float64


def learn_grid(
    key: Seed,
    model: AbstractDenoiser,
    solver: dfx.AbstractSolver | None = None,
    evaluations: int = 8,
    config: GridConfig | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    start: Float[Array, "draws ..."] | None = None,
    cond: PyTree = None,
    draws: int = 2048,
    denoise: bool = False,
    progress: bool = True,
    **changes: Any,
) -> LearnedGrid:
    """Fit the times, and the weights, of a solve of `evaluations` by equation (1).

    **Arguments:**
    - `key`: a typed random key.
    - `model`: a denoiser.
    - `solver`: with a fixed number of evaluations a step; `UniPC(2)` in velocity.
    - `evaluations`: network evaluations of one solve; 8.
    - `config`: the optimisation; `GridConfig()`.
    - `shape`: the shape of one sample, from whose noise `draws` starts are drawn; or
    - `start`: x at t_max, (draws, ...).
    - `cond`: a pytree of arrays with leading axis draws, or None.
    - `draws`: the number of starts without `start`; 2048.
    - `denoise`: as in `sample`, included in `evaluations`; no.
    - `progress`: whether to show a progress bar; yes.
    - `changes`: fields of `config` by name, which replace those of `config`.

    **Returns:** a grid for `sample(key, model, shape, grid=grid)`.

    **Raises:** ValueError for what does not fit, and where a solve fails.

    Cost: about 5 `evaluations` x `iterations` network evaluations on `kept` samples and
    a fine solve of all `draws` in one batch. After Watson et al. 2022, "Learning fast
    samplers for diffusion models by differentiating through sample quality", with the
    fine solve as the target, as in Shaul et al. 2024, "Bespoke non-stationary solvers".
    """
    config = configured(GridConfig, config, changes, "learn_grid")
    solver = UniPC(2, prediction=velocity) if solver is None else solver
    steps, path = _steps(solver, evaluations, denoise), model.path
    start_key, order_key = jax.random.split(key := random_key(key))
    start = _starts(start_key, path, shape, start, cond, draws)
    options = {"start": start, "cond": cond, "denoise": denoise}
    fine, stock = _fine_and_stock(key, model, solver, steps, options, config.tolerance)
    pick, share = _hardest(order_key, _square(stock, fine), config.kept)
    target, options["start"] = fine[pick], start[pick]
    options["cond"] = jax.tree.map(lambda c: c[pick], cond)
    low, high = (v / 2 for v in logsnr_span(path))
    times = CosineGrid(steps, model.overall_sigma_data)(path)[1:-1]
    nodes = [low[None], jax.vmap(path.logsnr)(times) / 2, high[None]]
    gaps = jnp.diff(jnp.concatenate(nodes))
    parameters = {"gaps": jnp.log(jnp.maximum(gaps, 1e-3))}
    if config.weights and isinstance(solver, UniPC | DEIS):
        sizes = (steps, solver.points), (steps, solver.corrector)
        parameters["weights"] = Weights(*(jnp.zeros(n, start.dtype) for n in sizes))

    def build(parameters):
        share = jnp.cumsum(jax.nn.softmax(parameters["gaps"]))[:-1]
        chosen = solver
        if "weights" in parameters:
            chosen = _replaced(solver, "weights", parameters["weights"])
        return LearnedGrid(steps, low + (high - low) * share, chosen, bool(denoise))

    def loss(parameters, model, options, target):
        options = {"grid": build(parameters)} | options
        out = sample(order_key, model, target.shape, **options)
        square, tiny = _square(out.x, target), jnp.finfo(start.dtype).eps ** 1.5
        worst = jnp.log(jnp.sum(share * square) + tiny)
        typical = jnp.sum(share * jnp.log(square + tiny))
        return worst / 2 + typical / 4

    given = model, options, target
    best, losses = _descend(loss, parameters, given, config, progress)
    return _replaced(build(best), "losses", jnp.asarray(losses, start.dtype))


def _steps(solver, evaluations, denoise):
    """The steps that so many evaluations are; refuses what cannot be learned."""
    name, first = type(solver).__name__, 0
    if isinstance(solver, AbstractSemilinearSolver):
        calls, first = solver.calls, solver.calls_first
        if solver.draws:
            raise ValueError(f"a grid is learned on the flow, and {name} adds noise.")
    else:
        calls, two = (int(count(solver, jnp.asarray(n))) for n in (1, 2))
        if calls < 1 or two != 2 * calls:
            raise ValueError(
                "learn_grid needs a solver with a fixed number of evaluations a step, "
                f"got {name}. Use DEIS() or UniPC()."
            )
    steps, rest = divmod(evaluations - bool(denoise) - first, calls)
    if rest or steps < 1:
        raise ValueError(
            f"{name} makes {calls} evaluations a step, and evaluations={evaluations} "
            f"with denoise={bool(denoise)} is no whole number of steps."
        )
    return steps


def _starts(key, path, shape, start, cond, draws):
    """x at t_max, as it was given or drawn."""
    dtype = float_array(path.t_min).dtype
    if (start is None) == (shape is None):
        raise ValueError(
            "learn_grid needs the shape of one sample, shape=(2,), or starts at t_max, "
            "start=x of shape (draws, ...), and not both."
        )
    if start is None:
        scale, keys = path.sigma(path.t_max), jax.random.split(key, draws)
        start = scale * jax.vmap(lambda k: path.noise.sample(k, shape, dtype))(keys)
        start = basis_of(path).data(start)
    start = jnp.asarray(start, dtype)
    odd = [c.shape for c in jax.tree.leaves(cond) if c.shape[:1] != start.shape[:1]]
    if odd:
        raise ValueError(f"cond needs {len(start)} rows, as start, got shape {odd[0]}.")
    return start


def _fine_and_stock(key, model, solver, steps, options, tolerance):
    """Where a fine solve ends, and where `solver` does on a stock grid."""
    shape, double = options["start"].shape, options["start"].dtype == jnp.float64
    if tolerance is None:
        tolerance = 1e-9 if double else 1e-5
    adaptive = Adaptive(tolerance, tolerance)
    fine = sample(key, model, shape, solver=dfx.Tsit5(), grid=adaptive, **options)
    if not bool(fine.ok.all()):
        raise ValueError(f"the fine solve did not reach the data: {fine.result}")
    grid = CosineGrid(steps, model.overall_sigma_data)
    return fine.x, sample(key, model, shape, solver=solver, grid=grid, **options).x


def _descend(loss, parameters, arguments, config, progress):
    """(the best parameters, the loss of every iteration)."""
    chunk = max(1, -(-config.iterations // 20))  # 20 updates of the progress bar
    total = chunk * -(-config.iterations // chunk)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(config.rate, total)),
    )

    @eqx.filter_jit
    def run(carry, arguments):
        def update(carry, _):
            parameters, state, best = carry
            value, slope = jax.value_and_grad(loss)(parameters, *arguments)
            best = _where(value < best[0], (value, parameters), best)
            # A step that is not finite is not taken.
            ok = jnp.isfinite(value) & jnp.isfinite(global_norm(slope))
            change, new = optimizer.update(slope, state)
            moved = optax.apply_updates(parameters, change)
            return (*_where(ok, (moved, new), (parameters, state)), best), value

        return jax.lax.scan(update, carry, None, length=chunk)

    best = (jnp.asarray(jnp.inf, parameters["gaps"].dtype), parameters)
    carry, losses = (parameters, optimizer.init(parameters), best), []
    with progress_bar(total, progress) as bar:
        while len(losses) < total:
            carry, values = run(carry, arguments)
            losses.extend(np.asarray(values).tolist())
            bar.update(chunk)
            bar.set_postfix(error=f"{np.exp(losses[-1]):.2g}")
    if not np.isfinite(losses).any():
        raise ValueError("the solve was not finite at any iteration; nothing learned.")
    return carry[2][1], losses


def _where(condition, new, old):
    return jax.tree.map(functools.partial(jnp.where, condition), new, old)


def _square(x, target) -> Float[Array, " draws"]:
    """The mean square error of each sample."""
    return jnp.mean((x - target) ** 2, axis=tuple(range(1, x.ndim)))


def _hardest(key, error, kept):
    """(`kept` indices, their shares): half the largest errors, half of the rest.

    The few samples that decide the error, near the border between two modes, stand for
    themselves, the others for all that were left out.
    """
    total = len(error)
    if kept >= total:
        return jnp.arange(total), jnp.full(total, 1 / total, error.dtype)
    order, hard = jnp.argsort(-error), kept // 2
    rest = jax.random.permutation(key, order[hard:])[: kept - hard]
    weight = (total - hard) / (kept - hard)
    share = jnp.concatenate([jnp.ones(hard), jnp.full(kept - hard, weight)]) / total
    return jnp.concatenate([order[:hard], rest]), share.astype(error.dtype)
