"""`fit`: the loop that trains, saves, resumes, stops in good order, and tells.

Every quantity of step n is a function of (seed, n), and every compiled call starts at a
multiple of `steps_per_call`, interrupted or not: a run that was killed and started
again runs the same programs on the same numbers, and ends in the same bits.
"""

import dataclasses
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from ..data.stream import AbstractStream
from ..runs import checkpoint
from ..runs.recorder import Recorder, progress_bar
from ..runs.throughput import Speedometer, Trace
from ..typing import PyTree, ScalarLike
from .compiled_loop import as_optimizer
from .ema import AbstractAverage, as_averages
from .feed import Feed
from .optimizer import AbstractOptimizer
from .preemption import Preempted, Preemption
from .run import Run
from .run_directory import Disk
from .step import TrainState

_COPY_EVERY = 10.0  # seconds between copies of a good state, where none is on disk
_AHEAD = 2  # calls in flight; more can deadlock collectives on simulated devices


class NonFiniteError(FloatingPointError):
    """Training met a loss or a gradient that is not finite.

    `step` is the first such step; `state` is the state just before it, all finite;
    `checkpoint` is where it was saved, or None.
    """

    def __init__(self, message: str, step: int, state: TrainState, path: Path | None):
        super().__init__(message)
        self.step, self.state, self.checkpoint = step, state, path


@dataclasses.dataclass(frozen=True)
class Fit:
    """What `fit` returns.

    `model` is the trained one, by the first of its averages; `state` is the last;
    `losses` are those of the steps from `start` on, where this process began or went
    on.
    """

    model: Any
    state: TrainState
    losses: Float[np.ndarray, " steps"]
    start: int = 0

    @property
    def denoiser(self):
        """The old name of `model`, which raises."""
        raise AttributeError("Fit has no `denoiser`: the trained model is `Fit.model`.")


def fit(
    model: eqx.Module,
    data: Array | np.ndarray | AbstractStream,
    *,
    steps: int,
    batch_size: int = 128,
    seed: int = 0,
    optimizer: AbstractOptimizer | optax.GradientTransformation | None = None,
    cond: PyTree = None,
    loss: Callable | None = None,
    ema: ScalarLike | AbstractAverage | Sequence = 0.999,
    augment: Callable | None = None,
    accumulate: int = 1,
    steps_per_call: int = 50,
    mesh: jax.sharding.Mesh | None = None,
    recorder: Recorder | None = None,
    directory: str | Path | None = None,
    save_every: int | None = None,
    keep: int | None = 3,
    snapshot_every: int | None = None,
    watch: Callable[[int, Any], None] | None = None,
    watch_every: int | None = None,
    profile: str | Path | None = None,
    progress: bool = True,
) -> Fit:
    """Train what `model.trainable` names; the rest of the model stays as it is.

    What is trained:

    **Arguments:** `model`, an `AbstractModel`;
    `data`, floating point (n, ...) or uint8 images (n, h, w, c), which become [-1, 1],
    kept on the device, or an `AbstractStream` (see `sdegen.data`); `cond`, arrays with
    leading axis n, or None; `optimizer`, a module of `sdegen.optimizer` or any Optax
    transformation; `loss`, a function (model, key, x0, cond, *, axis_name), default
    the model's own, for instance `eqx.Partial(denoising_loss,
    times=LogNormal())`; `ema`, a decay, an average of `sdegen.average`, or several;
    `augment(key, x) -> x`, on one sample, before bytes become floats.

    How: `accumulate`, parts that a batch is worked off in; `steps_per_call`, steps in
    one compiled call; `mesh`, see `sdegen.mesh.make_mesh`: "data" splits the batch,
    "fsdp" the parameters too.

    What remains: `recorder`, gets one row per call; `directory`, where checkpoints are
    written every `save_every` steps (default: twenty in all), the last `keep` of them
    kept, and from which the same call goes on after it was stopped; every
    `snapshot_every` steps (default: 32 in all) the power-function averages are saved
    for `python -m sdegen.posthoc_ema`; `watch(step, model)` is called every
    `watch_every` steps to look at samples say; `profile`, a
    directory for a profiler's trace of three calls. Steps are rounded up to whole
    calls.

    **Raises:** `NonFiniteError` when the loss stops being finite; the last good state
    is in it, and in `directory` as `last_good`, if one was given. `Preempted`, which
    ends the program with code 75, after SIGTERM, once the state is saved (only with a
    `directory`). OSError if a checkpoint cannot be written.
    """
    if steps < 1 or steps_per_call < 1:
        raise ValueError(
            f"fit needs steps >= 1 and steps_per_call >= 1, got {steps} and "
            f"{steps_per_call}."
        )
    optimizer, averages = as_optimizer(optimizer), as_averages(ema)
    feed = Feed(
        data, cond, batch_size=batch_size, seed=seed, mesh=mesh, accumulate=accumulate
    )
    run = Run(
        model,
        feed,
        steps=steps,
        steps_per_call=steps_per_call,
        options={
            "optimizer": optimizer,
            "loss": loss,
            "ema": averages,
            "augment": augment,
            "accumulate": accumulate,
        },
    )
    disk = Disk(directory, run, data, keep, save_every, snapshot_every)
    with disk:
        return _loop(run, disk, recorder, watch, watch_every, profile, progress)


def _loop(run, disk, recorder, watch, watch_every, profile, progress):
    start, losses, pending, heard = run.done, [], deque(), False
    unsolved: dict[str, float] = {}
    if recorder is not None and disk.here:
        recorder.rewind(start)
    good, copied = None, time.perf_counter()
    if not disk.here:
        good = (0, _copy(run.leaves))
    speed, flops_known = Speedometer(run.feed.batch_size), False
    watch_every = watch_every or max(run.steps // 10, 1)

    def settle():
        """Look at the oldest call in flight: finite? then a row."""
        nonlocal heard
        first, count, metrics = pending.popleft()
        metrics = jax.device_get(metrics)
        heard = bool(metrics.pop("heard", False)) or heard
        finite = np.logical_and.reduce([np.isfinite(m) for m in metrics.values()])
        if not finite.all():
            bad = int(np.argmin(finite))
            _non_finite(first + bad, metrics["loss"][bad], run, disk, good)
        losses.append(metrics["loss"])
        metrics.pop("update_norm")
        names = ("loss", "grad_norm", *metrics)
        means = {name: float(metrics[name].mean()) for name in names}
        for name, share in means.items():
            if name.endswith("_unsolved"):
                unsolved[name] = unsolved.get(name, 0.0) + share * count
        mean = means["loss"]
        rates = speed.passed(count)
        bar.set_postfix_str(_postfix(mean, rates), refresh=False)
        bar.update(count)
        if recorder is not None:
            recorder.row(step=first + count, **means)
            recorder.timing(step=first + count, **rates)

    guard = Preemption(run.feed.mesh) if disk.here else nullcontext()
    counts = run.counts(start, run.steps)
    chunks = run.feed.chunks(start, run.counts(start, run.steps))
    with (
        guard as stop,
        progress_bar(run.steps, progress, start) as bar,
        chunks as fed_chunks,
        Trace(profile) as trace,
    ):
        for fed, count in zip(fed_chunks, counts, strict=False):
            if not flops_known and (recorder is not None or progress):
                speed.flops, flops_known = run.flops(fed), True
            trace.call()
            aux = stop.aux() if disk.here else None
            pending.append((run.done, count, run.advance(fed, count, aux)))
            save, snap = disk.due(count)
            look = watch is not None and (
                run.crossed(watch_every, count) or run.done == run.steps
            )
            now = time.perf_counter()
            copy = good is not None and now - copied > _COPY_EVERY
            # What is kept or shown is known to be finite first.
            bound = 0 if save or snap or look or copy else _AHEAD - 1
            while len(pending) > bound:
                settle()
            told = disk.here and stop.requested(heard)
            while told and pending:
                settle()
            if copy:
                good, copied = (run.done, _copy(run.leaves)), now
            if snap:
                disk.snapshot()
            if save or told:
                disk.save()
            if told and run.done < run.steps:
                disk.close()
                raise Preempted(
                    f"told to stop: step {run.done} of {run.steps} is saved in "
                    f"{disk.directory}; the same command goes on from there.",
                    run.done,
                )
            if look:
                watch(run.done, run.averaged(copy=True))
        while pending:
            settle()
    disk.close()
    total = max(run.done - start, 1)
    warn_of_unsolved({name: count / total for name, count in unsolved.items()})
    losses = np.concatenate(losses) if losses else np.zeros(0, np.float32)
    return Fit(run.averaged(), run.state, losses, start)


def warn_of_unsolved(shares: Mapping[str, float]) -> None:
    """Say so where the plans of a coupling were not those that were asked for."""
    for name, share in shares.items():
        if share > 0:
            warnings.warn(
                f"{share:.1%} of the plans of the coupling did not reach their "
                f'tolerance (the column "{name}" of the record); what was reached was '
                "used. Give it more max_iterations, a larger regularisation or a "
                "looser tolerance.",
                stacklevel=4,
            )


def _postfix(loss, rates):
    words = [f"loss {loss:.4f}"]
    if "samples_per_second" in rates:
        words.append(f"{rates['samples_per_second']:,.0f} samples/s")
    if "utilisation" in rates:
        words.append(f"{100 * rates['utilisation']:.0f} % of peak")
    return ", ".join(words)


@jax.jit
def _copy(leaves):
    return [jnp.copy(leaf) for leaf in leaves]


def _non_finite(step, value, run, disk, good):
    """Go back to the last good state, on to the step before the bad one, and stop."""
    if disk.here:
        disk.checkpoints.wait()
        disk.restore()
    else:
        run.done, run.leaves = good
    run.replay(step)
    saved = None
    if disk.here:
        saved = checkpoint.save(disk.directory / "last_good", run.state, replace=True)
    place = "it is in this error's `state`" if saved is None else f"saved in {saved}"
    raise NonFiniteError(
        f"step {step} gave a loss of {value}, or a gradient or update that is not "
        f"finite; training stopped there. The last good state, after {step} steps, is "
        f"kept: {place}. Try a smaller learning rate or more warm-up.",
        step,
        run.state,
        saved,
    )
