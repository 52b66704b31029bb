"""Learning where to step: the grid, and the solver's weights, for one model.

A solve of N steps is a differentiable function of its N + 1 times and of the weights
with which a multistep solver combines its predictions. Both are fitted so that it ends
where a fine solve of the same model from the same noise ends:

    minimise  log E |e|^2 / 2 + E log |e| / 2,     e = x_N - x_fine                  (1)

The first term is the error of the worst samples, the second that of the typical one; as
logarithms they count alike at any number of steps. The path, the network and the two
ends stay as they are, so the result costs nothing at sampling time.
"""

import functools
import json
from pathlib import Path

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
from ..runs.recorder import progress_bar
from ..sampling.sample import sample
from ..solvers import UniPC, Weights
from ..solvers.grids import AbstractGrid, Adaptive, CosineGrid
from ..typing import PyTree, RandomKey, float_array
from .optimizer import global_norm

_CALLS = 20  # updates of the progress bar


class LearnedGrid(AbstractGrid):
    """Times at learned log-SNRs, with the solver that they were learned for.

    `sample(..., grid=grid)` uses `grid.solver` unless another is given. `losses` are
    the values of (1), one per iteration.
    """

    steps: int = eqx.field(static=True)
    half_logsnr: Float[Array, " inner"]
    solver: dfx.AbstractSolver
    denoise: bool = eqx.field(default=False, static=True)
    losses: Float[Array, " iterations"] | None = None

    def __call__(self, path):
        """The times for `path`, both ends included."""
        inner = jax.vmap(path.inverse())(jax.nn.softplus(self.half_logsnr))
        ends = float_array(path.t_max)[None], float_array(path.t_min)[None]
        return jnp.concatenate([ends[0], inner, ends[1]])

    def save(self, file: str | Path) -> Path:
        """Write the log-SNRs and weights as JSON, for `load_grid`."""
        weights = getattr(self.solver, "weights", None)
        content = {
            "solver": _name(self.solver),
            "steps": self.steps,
            "denoise": self.denoise,
            "half_logsnr": np.asarray(self.half_logsnr).tolist(),
            "weights": weights and [np.asarray(w).tolist() for w in _pair(weights)],
        }
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content) + "\n")
        return file


def load_grid(file: str | Path, solver: dfx.AbstractSolver) -> LearnedGrid:
    """The grid saved in `file`; `solver` is the one it was learned for."""
    content = json.loads(Path(file).read_text())
    if content["solver"] != _name(solver):
        raise ValueError(
            f"{file} was learned for {content['solver']}, got {_name(solver)}. Load it "
            "with the solver it was learned for."
        )
    if content["weights"] is not None:
        arrays = [float_array(np.asarray(w)) for w in content["weights"]]
        solver = _with_weights(solver, Weights(*arrays))
    nodes = float_array(np.asarray(content["half_logsnr"]))
    return LearnedGrid(content["steps"], nodes, solver, content["denoise"])


def _name(solver) -> str:
    """The class and what it is made with, but for numbers."""
    fields = {k: v for k, v in vars(solver).items() if isinstance(v, int | Prediction)}
    return (
        f"{type(solver).__name__}({', '.join(f'{k}={v}' for k, v in fields.items())})"
    )


def _pair(weights):
    return weights.predictor, weights.corrector


def _with_weights(solver, weights):
    return eqx.tree_at(
        lambda s: s.weights, solver, weights, is_leaf=lambda x: x is None
    )


def learn_grid(
    key: RandomKey,
    denoiser: AbstractDenoiser,
    solver: dfx.AbstractSolver | None = None,
    evaluations: int = 8,
    *,
    shape: tuple[int, ...] | None = None,
    start: Float[Array, "draws ..."] | None = None,
    cond: PyTree = None,
    draws: int = 2048,
    kept: int = 512,
    denoise: bool = False,
    weights: bool = True,
    iterations: int = 300,
    rate: float = 0.03,
    tolerance: float | None = None,
    progress: bool = True,
) -> LearnedGrid:
    """Fit the times, and the weights, of a solve of `evaluations` by equation (1).

    **Arguments:** `solver`, with a fixed number of evaluations a step (default
    `UniPC(2)` in velocity, the best of those tried at 5 to 10 evaluations); `shape`, of
    one sample, from whose noise `draws` starts are drawn, or `start`, x at t_max,
    (draws, ...); `cond`, with leading axis `draws`; `kept`, how many starts are trained
    on, half of them those that a stock grid solves worst; `denoise`, as
    in `sample`, included in `evaluations`; `weights`, learn those too if the solver has
    any (`DEIS`, `UniPC`); `iterations` of Adam at `rate`, which falls to 0 by a cosine;
    `tolerance` of the fine solve (default 1e-5, or 1e-9 in float64).

    **Returns:** a grid to sample with: `sample(key, denoiser, shape, grid=grid)`.

    Cost: about 5 `evaluations` x `iterations` network evaluations on `kept` samples and
    a fine solve of all `draws` in one batch. After Watson et al. 2022, "Learning fast
    samplers for diffusion models by differentiating through sample quality", with the
    fine solve as the target, as in Shaul et al. 2024, "Bespoke non-stationary solvers".
    """
    solver = UniPC(2, prediction=velocity) if solver is None else solver
    path = denoiser.path
    calls = getattr(solver, "calls", None) or _calls(solver)
    first = getattr(solver, "calls_first", 0)
    steps, rest = divmod(evaluations - bool(denoise) - first, calls)
    if rest or steps < 1:
        raise ValueError(
            f"{type(solver).__name__} makes {calls} evaluations a step, and evaluations"
            f"={evaluations} with denoise={bool(denoise)} is no whole number of steps."
        )
    if getattr(solver, "draws", False):
        raise ValueError(
            f"a grid is learned along the flow, and {type(solver).__name__} adds noise."
        )
    if start is not None and shape is not None:
        raise ValueError("give learn_grid shape, or start, which has one: not both.")
    dtype = float_array(path.t_min).dtype
    start_key, order_key = jax.random.split(key)
    if start is None:
        if shape is None:
            raise ValueError(
                "learn_grid needs the shape of one sample, shape=(2,), or starts at "
                "t_max, start=x of shape (draws, ...)."
            )
        scale = path.sigma(path.t_max)
        keys = jax.random.split(start_key, draws)
        start = scale * jax.vmap(lambda k: path.noise.sample(k, shape, dtype))(keys)
        start = basis_of(path).data(start)
    start = jnp.asarray(start, dtype)
    odd = [c.shape for c in jax.tree.leaves(cond) if c.shape[:1] != start.shape[:1]]
    if odd:
        raise ValueError(
            f"cond needs one row for each of the {len(start)} starts, got the shape "
            f"{odd[0]}."
        )
    if tolerance is None:
        tolerance = 1e-9 if dtype == jnp.float64 else 1e-5
    options = {"start": start, "cond": cond, "denoise": denoise}
    fine = sample(
        key,
        denoiser,
        start.shape,
        solver=dfx.Tsit5(),
        grid=Adaptive(tolerance, tolerance),
        **options,
    )
    if not bool(fine.ok):
        raise ValueError(f"the fine solve did not reach the data: {fine.result}")

    spread = getattr(denoiser, "sigma_data", 0.5)
    stock = sample(
        key,
        denoiser,
        start.shape,
        solver=solver,
        grid=CosineGrid(steps, spread),
        **options,
    )
    pick, share = _hardest(order_key, _square(stock.x, fine.x), kept)
    target, options["start"] = fine.x[pick], start[pick]
    options["cond"] = jax.tree.map(lambda c: c[pick], cond)
    low, high = (v / 2 for v in logsnr_span(path))
    times = CosineGrid(steps, spread)(path)[1:-1]
    nodes = jax.vmap(path.logsnr)(times) / 2
    gaps = jnp.diff(jnp.concatenate([low[None], nodes, high[None]]))
    parameters = {"gaps": jnp.log(jnp.maximum(gaps, 1e-3))}
    if weights and hasattr(solver, "weights"):
        older = jnp.zeros((steps, solver.points), dtype)
        newer = jnp.zeros((steps, getattr(solver, "corrector", 0)), dtype)
        parameters["weights"] = Weights(older, newer)

    def build(parameters):
        share = jnp.cumsum(jax.nn.softmax(parameters["gaps"]))[:-1]
        chosen = solver
        if "weights" in parameters:
            chosen = _with_weights(solver, parameters["weights"])
        return LearnedGrid(steps, low + (high - low) * share, chosen, bool(denoise))

    def loss(parameters, denoiser, options, target):
        grid = build(parameters)
        out = sample(order_key, denoiser, target.shape, grid=grid, **options)
        square, tiny = _square(out.x, target), jnp.finfo(dtype).eps ** 1.5
        worst = jnp.log(jnp.sum(share * square) + tiny)
        typical = jnp.sum(share * jnp.log(square + tiny))
        return worst / 2 + typical / 4

    chunk = max(1, -(-iterations // _CALLS))
    total = chunk * -(-iterations // chunk)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(rate, total)),
    )

    @eqx.filter_jit
    def run(carry, denoiser, options, target):
        def update(carry, _):
            parameters, state, best = carry
            value, slope = jax.value_and_grad(loss)(
                parameters, denoiser, options, target
            )
            best = jax.tree.map(
                functools.partial(jnp.where, value < best[0]), (value, parameters), best
            )
            # A step that is not finite is not taken.
            ok = jnp.isfinite(value) & jnp.isfinite(global_norm(slope))
            change, new = optimizer.update(slope, state)
            state = jax.tree.map(functools.partial(jnp.where, ok), new, state)
            change = jax.tree.map(lambda c: jnp.where(ok, c, 0.0), change)
            return (optax.apply_updates(parameters, change), state, best), value

        return jax.lax.scan(update, carry, None, length=chunk)

    best = (jnp.asarray(jnp.inf, dtype), parameters)
    carry, losses = (parameters, optimizer.init(parameters), best), []
    with progress_bar(total, progress) as bar:
        while len(losses) < total:
            carry, values = run(carry, denoiser, options, target)
            losses.extend(np.asarray(values).tolist())
            bar.update(chunk)
            bar.set_postfix(error=f"{np.exp(losses[-1]):.2g}")
    if not np.isfinite(losses).any():
        raise ValueError("the solve was not finite at any iteration; nothing learned.")
    grid = build(carry[2][1])
    return eqx.tree_at(
        lambda g: g.losses,
        grid,
        jnp.asarray(losses, dtype),
        is_leaf=lambda x: x is None,
    )


def _square(x, target) -> Float[Array, " draws"]:
    """The mean square error of each sample."""
    return jnp.mean((x - target) ** 2, axis=tuple(range(1, x.ndim)))


def _hardest(key, error, kept):
    """(`kept` indices, their shares): half the largest errors, half of the rest.

    Few samples decide the mean square error, those near the border between two modes.
    Each of them stands for itself, the others for all that were left out.
    """
    total = len(error)
    if kept >= total:
        return jnp.arange(total), jnp.full(total, 1 / total, error.dtype)
    order, hard = jnp.argsort(-error), kept // 2
    rest = jax.random.permutation(key, order[hard:])[: kept - hard]
    weight = (total - hard) / (kept - hard)
    share = jnp.concatenate([jnp.ones(hard), jnp.full(kept - hard, weight)]) / total
    return jnp.concatenate([order[:hard], rest]), share.astype(error.dtype)


def _calls(solver) -> int:
    from ..solvers import evaluations as count

    one, two = (int(count(solver, jnp.asarray(n))) for n in (1, 2))
    if one < 1 or two != 2 * one:
        raise ValueError(
            f"learn_grid needs a solver with a fixed number of evaluations a step, got "
            f"{type(solver).__name__}. Use DEIS() or UniPC()."
        )
    return one
