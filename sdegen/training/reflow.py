"""Pairs from a model's own flow, and training on them, round after round.

A flow joins every start to one end: Z_1 -> Z_0. Trained on these pairs in place of the
coupling that made it, the next flow has the same laws at both ends, paths that cross
less, and costs E|Z_1 - Z_0|^2 that never rise (Liu et al. 2023, "Flow straight and
fast", theorems 3.3, 3.5); its straightness S = int E|(Z_1 - Z_0) - dZ/dt|^2 dt falls to
0, and with it the number of steps that sampling needs. Straight is not optimal: the
coupling need not be that of optimal transport.

With noise, `stochasticity=1` of a `SchroedingerBridge`, up and down in turn, the same
rounds are iterative Markovian fitting (Shi et al. 2023), whose coupling becomes that of
the Schroedinger bridge.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ..data.stream import Arrays
from ..losses.coupling.pairs import PairedData, independent, paired
from ..losses.denoising import denoising_loss
from ..mesh import batch_sharding, to_host
from ..metrics.path_energy import straightness
from ..models.denoiser import AbstractDenoiser
from ..models.generator import AbstractGenerator
from ..models.velocity import Forward
from ..processes.noise import Empirical
from ..processes.path import basis_of
from ..runs.recorder import progress_bar
from ..sampling.sample import sample
from ..typing import PyTree, RandomKey, ScalarLike, is_traced
from . import fit

_WATCHED = 1024
"""So many paths are followed for the straightness."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reflow:
    """Pairs that a flow has made, on the host, and how it moved.

    `x0` and `x1`, (n, ...), are the data end and the noise end of each pair; `cond` the
    condition of each, or None. `transport_cost` is E|x1 - x0|^2 and `straightness` S
    (nan with noise), both in (units of the data)^2, summed over coordinates, with
    standard errors; on a path that is not the rectified flow they are those of x /
    (alpha + sigma). `evaluations` of the network were made for each pair.
    """

    x0: Float[np.ndarray, "n ..."]
    x1: Float[np.ndarray, "n ..."]
    cond: PyTree
    transport_cost: float
    transport_cost_error: float
    straightness: float
    straightness_error: float
    evaluations: int

    @property
    def stream(self) -> Arrays:
        """The pairs as `fit` takes them, with coupling `paired`."""
        return Arrays(self.x0, PairedData(self.x1, self.cond))


def reflow(
    key: RandomKey,
    model: AbstractDenoiser | AbstractGenerator,
    n: int,
    *,
    shape: tuple[int, ...] | None = None,
    start: Float[np.ndarray, "n ..."] | None = None,
    cond: PyTree = None,
    batch_size: int = 4096,
    solver: Any = None,
    grid: Any = None,
    stochasticity: ScalarLike = 0.0,
    mesh: Mesh | None = None,
    directory: str | Path | None = None,
    progress: bool = True,
) -> Reflow:
    """`n` pairs (start, end) of the flow of `model`, for the next round of training.

    **Arguments:** `model`, a denoiser, or a generator such as `VelocityModel`,
    `SchroedingerBridge` or `Forward`; `shape`, of one sample; or `start`, (n, ...), the
    states to start from: noise z of a denoiser, x1 of a model with a track, x0 of
    `Forward`; `cond`, leading axis n; `batch_size`, pairs made at a time, split over
    `mesh`; `solver`, `grid`, `stochasticity` as in `sample` (with noise, pairs depend
    on `batch_size`, too); `directory`, where the pairs are written as they are made,
    and from which the same call goes on; they are then read from disk by the stream.

    **Raises:** ValueError if a solve did not reach its end, or gave what is not finite;
    the pairs before it are kept in `directory`.
    """
    if start is not None:
        shape = tuple(np.shape(start)[1:])
        if len(start) != n:
            raise ValueError(
                f"start needs a row for each of {n} pairs, got {len(start)}."
            )
    if shape is None or n < 1:
        raise ValueError(
            "reflow needs the number of pairs and the shape of one sample, shape=(2,), "
            f"or starts of shape (n, ...), got n={n} and shape={shape}."
        )
    for leaf in jax.tree.leaves(cond):
        if np.shape(leaf)[:1] != (n,):
            raise ValueError(
                f"cond needs one row for each of the {n} pairs, got {np.shape(leaf)}."
            )
    sharding = None if mesh is None else batch_sharding(mesh)
    parts = 1 if mesh is None else len(sharding.device_set)
    batch_size = -(-min(batch_size, n) // parts) * parts
    up = isinstance(model, Forward)
    options = {"solver": solver, "grid": grid, "stochasticity": stochasticity}
    noisy = is_traced(stochasticity) or float(stochasticity) > 0
    held = (model, start, cond, options)
    x0, x1, log = _store(directory, key, n, shape, batch_size, held)
    watched = (float("nan"),) * 2
    with progress_bar(n, progress, log.done) as bar:
        while log.done < n:
            rows = slice(log.done, min(log.done + batch_size, n))
            index = np.resize(np.arange(rows.start, rows.stop), batch_size)
            given = None if start is None else jnp.asarray(start[index])
            some = jax.tree.map(lambda c: jnp.asarray(c[index]), cond)  # noqa: B023
            begin, ends = _starts(key, model, index, shape, given)
            out = sample(
                jax.random.fold_in(key, rows.start),
                model,
                (batch_size, *shape),
                start=begin,
                cond=some,
                sharding=sharding,
                **options,
            )
            count = rows.stop - rows.start
            ends, found = to_host(ends)[:count], to_host(out.x)[:count]
            if not bool(out.ok) or not np.isfinite(found).all():
                raise ValueError(
                    f"the flow of pairs {rows.start} to {rows.stop - 1} did not reach "
                    "its end, or is not finite there. Give a finer grid, or look at "
                    "the model."
                )
            x0[rows], x1[rows] = (ends, found) if up else (found, ends)
            if directory is not None:
                x0.flush(), x1.flush()  # the log must not be ahead of the pairs
            log.evaluations = int(out.evaluations)
            log.finish(rows.stop)
            bar.update(count)
    if not noisy:
        rows = np.arange(min(_WATCHED, n))
        given = None if start is None else jnp.asarray(start[rows])
        some = jax.tree.map(lambda c: jnp.asarray(c[rows]), cond)
        begin, _ = _starts(key, model, rows, shape, given)
        watched = _straightness(key, model, begin, some, solver, grid)
    # in parts: the arrays may be on disk
    parts = np.array_split(np.arange(n), max(1, n // 65536))
    gaps = [np.asarray(x1[p], np.float64) - x0[p] for p in parts]
    cost = np.concatenate([(g.reshape(len(g), -1) ** 2).sum(1) for g in gaps])
    error = float(cost.std() / np.sqrt(n))
    return Reflow(x0, x1, cond, float(cost.mean()), error, *watched, log.evaluations)


def _starts(key, model, index, shape, given):
    """(the first states of a solve, the ends that they stand for), of these pairs."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(index))
    if isinstance(model, AbstractGenerator):
        if given is None:
            given = jax.vmap(lambda k: model.start(k, shape))(keys)
        return given, given
    path = model.path
    basis = basis_of(path)
    if given is None:
        z = jax.vmap(lambda k: path.noise.sample(k, shape))(keys)
    else:
        z = basis.coordinates(given)
    return basis.data(path.sigma(path.t_max) * z), basis.data(z)


def _straightness(key, model, start, cond, solver, grid):
    """(S, its standard error) of the paths from these starts."""
    out = sample(
        key,
        model,
        start.shape,
        start=start,
        cond=cond,
        solver=solver,
        grid=grid,
        trajectory=True,
    )
    frames, times = np.asarray(out.trajectory), np.asarray(out.times)
    if isinstance(model, AbstractDenoiser):
        path = model.path
        alpha, sigma = (np.asarray(a) for a in jax.vmap(path.level)(out.times))
        size = (alpha + sigma).reshape(-1, *[1] * (frames.ndim - 1))
        frames, times = frames / size, sigma / (alpha + sigma)
    each = [straightness(frames[:, i : i + 1], times) for i in range(frames.shape[1])]
    return float(np.mean(each)), float(np.std(each) / np.sqrt(len(each)))


def _crc(held) -> int:
    """A checksum of all that the pairs depend on besides the key."""
    leaves = jax.tree.leaves(held)
    crc = zlib.crc32(str([leaf for leaf in leaves if np.isscalar(leaf)]).encode())
    for leaf in leaves:
        if isinstance(leaf, jax.Array):
            leaf = to_host(leaf)
        if isinstance(leaf, np.ndarray):
            crc = zlib.crc32(np.ascontiguousarray(leaf), crc)
    return crc


class _Log:
    """How many pairs are done; on disk, if the pairs are."""

    def __init__(self, file, what):
        self.file, self.what, self.done, self.evaluations = file, what, 0, -1

    def finish(self, done):
        self.done = done
        if self.file is not None:
            content = {"done": done, "evaluations": self.evaluations, **self.what}
            new = self.file.with_suffix(".new")
            new.write_text(json.dumps(content) + "\n")
            new.replace(self.file)


def _store(directory, key, n, shape, batch_size, held):
    """(x0, x1, log): arrays in memory, or those of a directory, begun or gone on."""
    dtype = np.dtype(jnp.result_type(float))
    if directory is None:
        x0, x1 = (np.empty((n, *shape), dtype) for _ in range(2))
        return x0, x1, _Log(None, {})
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    what = {
        "n": n,
        "shape": list(shape),
        "batch_size": batch_size,
        "dtype": dtype.name,
        "model, start, cond or solver": _crc(held),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }
    log, old = _Log(directory / "pairs.json", what), {}
    if log.file.exists():
        old = json.loads(log.file.read_text())
        log.done, log.evaluations = old.pop("done"), old.pop("evaluations")
        if old != what:
            name = next(k for k in what if old.get(k) != what[k])
            raise ValueError(
                f"{directory} holds pairs of another call: {name} was {old.get(name)}, "
                f"now {what[name]}. Give another directory, or remove it."
            )
    arrays = [
        np.lib.format.open_memmap(
            directory / f"{name}.npy",
            mode="r+" if old else "w+",
            dtype=dtype,
            shape=(n, *shape),
        )
        for name in ("x0", "x1")
    ]
    return *arrays, log


class Round(NamedTuple):
    """One round: the model that was trained, and the pairs that its flow makes."""

    number: int
    model: Any
    pairs: Reflow


def rectify(
    key: RandomKey,
    model: Any,
    x0: Array | np.ndarray,
    *,
    rounds: int = 2,
    n: int | None = None,
    cond: PyTree = None,
    loss: Callable = denoising_loss,
    coupling: Callable = independent,
    stochasticity: ScalarLike = 0.0,
    both_ways: bool = False,
    solver: Any = None,
    grid: Any = None,
    batch_pairs: int = 4096,
    directory: str | Path | None = None,
    seed: int = 0,
    **options: Any,
) -> Iterator[Round]:
    """Train, let the flow make pairs, train on those, and so on: k-rectified flow.

    Yields a `Round` after each; each goes on from the averaged network of the last.

    **Arguments:** `model`, with a field `network`, as `fit` takes it; `x0`, data;
    `loss`, `denoising_loss`, `velocity_loss` or `bridge_loss`; `coupling`, of the first
    round; `n`, pairs of a round (default: as many as data); `cond`, of the data: pairs
    are made for the same conditions; `both_ways`, go up from the data and down from x1
    in turn, which keeps both laws from drifting away (for a `SchroedingerBridge`:
    with `stochasticity=1` this is iterative Markovian fitting); `solver`, `grid`,
    `batch_pairs`, of `reflow`; `directory`, with a folder for each round, from which
    the same call goes on, in the training or the pairs, wherever it was stopped; the
    other `options` are those of `fit`.
    """
    n = len(x0) if n is None else n
    data, conditions = np.asarray(x0), cond
    if cond is not None and n != len(data):
        raise ValueError(
            "with conditions a round makes a pair for each sample: leave n out, got "
            f"{n} for {len(data)} samples."
        )
    source, first = (data, conditions), coupling
    for k in range(rounds):
        chosen = eqx.Partial(loss, coupling=first)
        place = None if directory is None else Path(directory) / f"round-{k + 1}"
        done = fit(
            model,
            source[0],
            cond=source[1],
            loss=chosen,
            seed=seed + k,
            directory=None if place is None else place / "training",
            **options,
        )
        model = done.model
        up = both_ways and k % 2 == 0
        mover, start = model, None
        if up:
            mover = Forward(model, Empirical(data))
            start = np.resize(data, (n, *data.shape[1:]))
        pairs = reflow(
            jax.random.fold_in(key, k),
            mover,
            n,
            shape=None if up else data.shape[1:],
            start=start,
            cond=conditions,
            batch_size=batch_pairs,
            solver=solver,
            grid=grid,
            stochasticity=stochasticity,
            mesh=options.get("mesh"),
            directory=None if place is None else place / "pairs",
            progress=options.get("progress", True),
        )
        yield Round(k + 1, model, pairs)
        source, first = (pairs.x0, PairedData(pairs.x1, conditions)), paired
