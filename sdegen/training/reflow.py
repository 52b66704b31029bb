"""Pairs from a model's own flow, and training on them, round after round.

A flow joins every start to one end: Z_1 -> Z_0. Trained on these pairs, the next flow
has the same distributions at both ends, paths that cross less, and costs E|Z_1 - Z_0|^2
that never rise (Liu et al. 2023, "Flow straight and fast", theorems 3.3, 3.5); its
straightness S = int E|(Z_1 - Z_0) - dZ/dt|^2 dt falls to 0, and with it the number of
steps that sampling needs. The coupling need not become that of optimal transport.

With noise, `stochasticity=1` of a `SchroedingerBridge`, up and down in turn, this is
iterative Markovian fitting (Shi et al. 2023), and leads to the Schroedinger bridge.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ..data.stream import Arrays
from ..losses.coupling.pairs import PairedData, paired
from ..losses.denoising import denoising_loss
from ..mesh import batch_sharding, to_host
from ..metrics.path_energy import straightness
from ..models.bridge import SchroedingerBridge
from ..models.denoiser import AbstractDenoiser
from ..models.generator import AbstractGenerator
from ..models.velocity import Forward, VelocityModel
from ..processes.noise import Empirical
from ..processes.path import basis_of
from ..runs.recorder import progress_bar
from ..sampling.sample import sample
from ..typing import PyTree, ScalarLike, Seed, is_traced, random_key
from .config import TrainingConfig, configured
from .fit import fit
from .pair_store import open_pairs

_WATCHED = 1024  # paths that the straightness is measured on


@dataclasses.dataclass(frozen=True, eq=False)
class Reflow:
    """Pairs that a flow has made, on the host, and how it moved.

    `x0` and `x1`, (n, ...), are the data end and the noise end of each pair; `cond` the
    condition of each, or None. `transport_cost` is E|x1 - x0|^2 and `straightness` S
    (nan with noise), both in (units of the data)^2, summed over coordinates, with
    standard errors; but for rectified flows they are those of x / (alpha + sigma).
    `evaluations` of the network were made for each pair.
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
    key: Seed,
    model: AbstractDenoiser | AbstractGenerator,
    shape: tuple[int, ...],
    *,
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
    """Pairs (start, end) of the flow of `model`, for the next round of training.

    **Arguments:**
    - `key`: a typed random key.
    - `model`: a denoiser, or a generator such as `VelocityModel` or `Forward`.
    - `shape`: (n, ...), for n pairs.
    - `start`: the states to start from, of this shape: noise z of a denoiser, x1 of a
      model with an interpolant, x0 of `Forward`; drawn by default.
    - `cond`: a pytree of arrays with leading axis n, or None.
    - `batch_size`: pairs made at a time, split over `mesh`; 4096.
    - `solver`, `grid`, `stochasticity`: as in `sample`. With noise the pairs depend on
      `batch_size`, too.
    - `mesh`: the devices; one by default.
    - `directory`: where the pairs are written as they are made, and from which the same
      call continues; they are then read from disk by the stream. None by default.
    - `progress`: whether to show a progress bar; yes.

    **Raises:** ValueError if a solve did not reach its end, or gave what is not finite;
    the pairs before it are kept in `directory`.
    """
    shape, key = _checked(shape, start, cond), random_key(key)
    n, shape = shape[0], shape[1:]
    sharding, parts = None, 1
    if mesh is not None:
        sharding = batch_sharding(mesh)
        parts = len(sharding.device_set)
    batch_size = -(-min(batch_size, n) // parts) * parts
    options = {"solver": solver, "grid": grid, "stochasticity": stochasticity}
    held = (model, start, cond, options)
    x0, x1, log = open_pairs(directory, key, n, shape, batch_size, held)

    def solved(own, index, **more):
        """A solve of these pairs, and the ends that its first states stand for."""
        given = None if start is None else jnp.asarray(start[index])
        some = jax.tree.map(lambda c: jnp.asarray(c[index]), cond)
        first, ends = _starts(key, model, index, shape, given)
        more |= {"start": first, "cond": some, **options}
        return sample(own, model, first.shape, **more), ends

    with progress_bar(n, progress, log.done) as bar:
        while log.done < n:
            rows = np.arange(log.done, min(log.done + batch_size, n))
            here = jax.random.fold_in(key, log.done)
            index = np.resize(rows, batch_size)
            out, ends = solved(here, index, sharding=sharding)
            _keep(out, ends, rows, (x0, x1), isinstance(model, Forward))
            log.evaluations = int(out.evaluations)
            log.finish(log.done + len(rows))
            bar.update(len(rows))
    bent = (float("nan"),) * 2
    if not is_traced(stochasticity) and float(stochasticity) == 0:
        out, _ = solved(key, np.arange(min(_WATCHED, n)), trajectory=True)
        bent = _straightness(out, model)
    return Reflow(x0, x1, cond, *_cost(x0, x1), *bent, log.evaluations)


def _checked(shape, start, cond):
    """`shape`, which start and conditions must fit."""
    shape = tuple(shape)
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            f"reflow needs the shape of its pairs, (n, ...), as (1000, 2), got {shape}."
        )
    if start is not None and np.shape(start) != shape:
        raise ValueError(f"start must have the shape {shape}, got {np.shape(start)}.")
    for found in map(np.shape, jax.tree.leaves(cond)):
        if found[:1] != shape[:1]:
            raise ValueError(
                f"cond needs one row for each of the {shape[0]} pairs, got {found}."
            )
    return shape


def _keep(out, ends, rows, pairs, up):
    """Write the pairs of a solve to their rows."""
    ends, found = (to_host(x)[: len(rows)] for x in (ends, out.x))
    if not bool(out.ok.all()) or not np.isfinite(found).all():
        raise ValueError(
            f"the flow of pairs {rows[0]} to {rows[-1]} did not reach its end, or is "
            "not finite there. Give a finer grid, or look at the model."
        )
    values = (ends, found) if up else (found, ends)
    for place, some in zip(pairs, values, strict=True):
        place[rows] = some
        if isinstance(place, np.memmap):
            place.flush()  # the log must not be ahead of the pairs


def _cost(x0, x1):
    """(E|x1 - x0|^2, its standard error), in parts: the arrays may be on disk."""
    parts = np.array_split(np.arange(len(x0)), max(1, len(x0) // 65536))
    gaps = (np.asarray(x1[p], np.float64) - x0[p] for p in parts)
    cost = np.concatenate([(g.reshape(len(g), -1) ** 2).sum(1) for g in gaps])
    return float(cost.mean()), float(cost.std() / np.sqrt(len(cost)))


def _starts(key, model, index, shape, given):
    """(the first states of a solve, the ends that they stand for), of these pairs."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(index))
    if isinstance(model, AbstractGenerator):
        if given is None:
            given = jax.vmap(lambda k: model.start(k, shape))(keys)
        return given, given
    path, basis = model.path, basis_of(model.path)
    if given is None:
        z = jax.vmap(lambda k: path.noise.sample(k, shape))(keys)
    else:
        z = basis.coordinates(given)
    return basis.data(path.sigma(path.t_max) * z), basis.data(z)


def _straightness(out, model):
    """(S, its standard error) of the trajectories of a solve."""
    frames, times = np.asarray(out.trajectory), np.asarray(out.times)
    if isinstance(model, AbstractDenoiser):
        alpha, sigma = (np.asarray(a) for a in jax.vmap(model.path.level)(out.times))
        size = (alpha + sigma).reshape(-1, *[1] * (frames.ndim - 1))
        frames, times = frames / size, sigma / (alpha + sigma)
    each = [straightness(frames[:, i : i + 1], times) for i in range(frames.shape[1])]
    return float(np.mean(each)), float(np.std(each) / np.sqrt(len(each)))


class Round(NamedTuple):
    """One round: the model that was trained, and the pairs that its flow makes."""

    number: int
    model: Any
    pairs: Reflow


def rectify(
    key: Seed,
    model: Any,
    x0: Array | np.ndarray,
    config: TrainingConfig | None = None,
    *,
    rounds: int = 2,
    n: int | None = None,
    cond: PyTree = None,
    loss: Callable | None = None,
    both_ways: bool = False,
    pairs: Mapping[str, Any] | None = None,
    directory: str | Path | None = None,
    **options: Any,
) -> Iterator[Round]:
    """Train, let the flow make pairs, train on those, and so on: k-rectified flow.

    Yields a `Round` after each, which goes on from the averaged model of the last.

    **Arguments:**
    - `key`: a typed random key, of the pairs.
    - `model`: a `Denoiser`, a `VelocityModel` or a `SchroedingerBridge`.
    - `x0`: data, (samples, ...).
    - `config`: how every round is trained, with its seed + k in round k.
    - `rounds`: the number of rounds; 2.
    - `n`: pairs of a round; as many as data.
    - `cond`: conditions of the data; pairs are made for the same ones. None by default.
    - `loss`: with a parameter `coupling`, which all rounds but the first replace, such
      as `eqx.Partial(velocity_loss, coupling=ExactOT())`; that of the model's class.
    - `both_ways`: go up from the data and down from x1 in turn, which keeps both
      distributions from drifting, as in iterative Markovian fitting; no.
    - `pairs`: `solver`, `grid`, `stochasticity` and `batch_size` of `reflow`.
    - `directory`: a folder for each round, from which the same call continues, in the
      training or the pairs, wherever it was stopped; none.
    - `options`: the other arguments of `fit`: fields of `config`, `mesh`, `progress`.
    """
    n, data, key = len(x0) if n is None else n, np.asarray(x0), random_key(key)
    if cond is not None and n != len(data):
        raise ValueError(
            "with conditions a round makes a pair for each sample: leave n out, got "
            f"{n} for {len(data)} samples."
        )
    loss = _loss_of(model) if loss is None else loss
    names = {field.name for field in dataclasses.fields(TrainingConfig)} & set(options)
    changes = {name: options.pop(name) for name in names}
    config = configured(TrainingConfig, config, changes, "rectify")
    shared = {k: options[k] for k in ("mesh", "progress") if k in options}
    x0, given, shape = data, cond, (n, *data.shape[1:])
    for k in range(rounds):
        training = pairs_in = None
        if directory is not None:
            place = Path(directory).expanduser() / f"round-{k + 1}"
            training, pairs_in = place / "training", place / "pairs"
        now = dataclasses.replace(config, seed=config.seed + k)
        options |= {"cond": given, "loss": loss, "directory": training}
        model = fit(model, x0, now, **options).model
        mover, start = model, None
        if both_ways and k % 2 == 0:
            mover, start = Forward(model, Empirical(data)), np.resize(data, shape)
        ends = {"start": start, "cond": cond, "directory": pairs_in}
        here = jax.random.fold_in(key, k)
        made = reflow(here, mover, shape, **ends, **dict(pairs or {}) | shared)
        yield Round(k + 1, model, made)
        x0, given, loss = made.x0, PairedData(made.x1, cond), _with_pairs(loss)


def _with_pairs(loss):
    """`loss` with the coupling `paired`, whatever its own is."""
    if not isinstance(loss, eqx.Partial):
        return eqx.Partial(loss, coupling=paired)
    keywords = dict(loss.keywords) | {"coupling": paired}
    return eqx.Partial(loss.func, *loss.args, **keywords)


def _loss_of(model):
    """The loss of a model that takes a coupling."""
    if isinstance(model, AbstractDenoiser):
        return denoising_loss
    if isinstance(model, VelocityModel | SchroedingerBridge):
        return type(model).loss
    raise ValueError(
        "rectify trains a Denoiser, a VelocityModel or a SchroedingerBridge, or gets a "
        f"loss= that takes a coupling, got {type(model).__name__}."
    )
