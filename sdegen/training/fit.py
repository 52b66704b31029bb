"""`fit`: the loop that trains, saves, resumes, handles preemption and logs.

Every quantity of step n is a function of (seed, n), and every compiled call starts at a
multiple of `steps_per_call`: a run that was killed and started again runs the same
programs on the same numbers, and ends in the same bits.
"""

import dataclasses
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ..data.stream import AbstractStream
from ..models.model import conditions
from ..runs import checkpoint
from ..runs.recorder import Recorder, progress_bar
from ..runs.throughput import Speedometer, Trace
from ..typing import PyTree, data_array
from .config import TrainingConfig, configured
from .diagnosis import cause
from .feed import Feed
from .preemption import Preempted, Preemption
from .run import Run
from .run_directory import RunDirectory
from .step import TrainState, check_model
from .validation import Validation

_COPY_EVERY = 10.0  # seconds between copies of a good state, where none is on disk
_AHEAD = 2  # calls in flight; more can deadlock collectives on simulated devices


class NonFiniteError(FloatingPointError):
    """Training met a loss or a gradient that is not finite.

    `step` is the first such step, `state` the state just before it, all finite, and
    `checkpoint` where it was saved, or None.
    """

    def __init__(self, message: str, step: int, state: TrainState, path: Path | None):
        super().__init__(message)
        self.step, self.state, self.checkpoint = step, state, path


@dataclasses.dataclass(frozen=True, repr=False)
class Fit:
    """What `fit` returns.

    `model` is the trained one, by the first of its averages, `state` the last one, and
    `losses` are those of the steps from `start` on, at which this process began.
    `validation` are the held-out losses by step. `stopped` says why training ended
    before its last step, if it did.
    """

    model: Any
    state: TrainState
    losses: Float[np.ndarray, " steps"]
    start: int = 0
    validation: dict[int, float] = dataclasses.field(default_factory=dict)
    stopped: str = ""

    def __repr__(self):
        size = lambda tree: sum(  # noqa: E731
            a.size for a in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
        )
        last = self.losses[-max(1, len(self.losses) // 10) :]
        lines = {
            "model": type(self.model).__name__,
            "parameters": f"{size(self.state.trained):,}",
            "averages": len(self.state.averages),
            "steps": f"{self.start:,} to {self.start + len(self.losses):,}",
            "loss": f"{last.mean():.4g} over the last tenth" if last.size else "-",
        }
        if self.validation:
            least = min(self.validation, key=lambda step: self.validation[step])
            text = f"{self.validation[max(self.validation)]:.4g}, least "
            lines["held out"] = f"{text}{self.validation[least]:.4g} at step {least:,}"
        if self.stopped:
            lines["stopped"] = self.stopped
        return "Fit\n" + "\n".join(f"  {k:<11} {v}" for k, v in lines.items())

    @property
    def denoiser(self):
        """The old name of `model`, which raises."""
        raise AttributeError("Fit has no `denoiser`: the trained model is `Fit.model`.")


def fit(
    model: eqx.Module,
    data: Array | np.ndarray | AbstractStream,
    config: TrainingConfig | None = None,
    *,
    cond: PyTree = None,
    loss: Callable | None = None,
    mesh: Mesh | None = None,
    recorder: Recorder | None = None,
    directory: str | Path | None = None,
    watch: Callable[[int, Any], Any] | None = None,
    validation: Any = None,
    profile: str | Path | None = None,
    progress: bool = True,
    **changes: Any,
) -> Fit:
    """Train a model: `fit(Denoiser(network, VP()), data, steps=500)`.

    **Arguments:**
    - `model`: an `AbstractModel`. What `model.trainable` names is trained.
    - `data`: floating-point data (n, ...) or uint8 images (n, h, w, c), which become
      [-1, 1], kept on the device; or an `AbstractStream`, see `sdegen.data`.
    - `config`: steps, batch size, optimiser and so on; `TrainingConfig()`.
    - `cond`: conditions, a pytree of arrays with leading axis n, or None.
    - `loss`: a function (model, key, x0, cond, *, axis_name), such as
      `eqx.Partial(denoising_loss, times=LogNormal())`; the model's own.
    - `mesh`: the devices, see `sdegen.mesh.make_mesh`: "data" splits the batch, "fsdp"
      the parameters too; one device by default.
    - `recorder`: gets a row for each compiled call; none.
    - `directory`: where the run is saved, and from which the same call continues after
      it was stopped; none.
    - `watch`: `watch(step, model)` is called with the averaged model now and then; if
      it returns True (on every process), training ends there.
    - `validation`: held-out data, or a pair (data, cond). The loss of the averaged
      model on all of it is looked at every `validate_every` steps, with the same noise
      and times each time, and may end training (`patience`, `stop`); none.
    - `profile`: a directory for a profiler's trace of three calls; none.
    - `progress`: whether to show a progress bar; yes.
    - `changes`: fields of `config` by name, which replace those of `config`.

    **Returns:** a `Fit`, with the trained model as `model`.

    **Raises:** ValueError for arguments that do not fit. `NonFiniteError` when the loss
    stops being finite; the last good state is in it, and in `directory` as `last_good`.
    `Preempted`, which ends the program with code 75, after SIGTERM with a `directory`,
    once the state is saved. OSError if a checkpoint cannot be written.
    """
    config = configured(TrainingConfig, config, changes, "fit")
    check_model(model)
    if not isinstance(data, AbstractStream):
        data = data_array(data, "fit", images=True)
        cond = conditions(model, cond, len(data))
    sizes = {"batch_size": config.batch_size, "accumulate": config.accumulate}
    feed = Feed(data, cond, seed=config.seed, mesh=mesh, **sizes)
    run = Run(feed.in_units(model), feed, config, loss)
    with RunDirectory(directory, run, data) as folder:
        held_out = Validation(validation, run, folder.history)
        loop = _Loop(run, folder, recorder, watch, held_out)
        return loop.train(profile, progress)


class UnsolvedPlans:
    """The share of the plans of a coupling that did not reach their tolerance."""

    def __init__(self):
        self._shares = defaultdict(list)

    def add(self, metrics: Mapping[str, np.ndarray]) -> None:
        """Count the columns of `metrics` whose names end in "_unsolved"."""
        for name, values in metrics.items():
            if name.endswith("_unsolved"):
                self._shares[name].append(float(np.mean(values)))

    def warn(self) -> None:
        """Warn if there were any."""
        for name, shares in self._shares.items():
            if (share := float(np.mean(shares))) > 0:
                warnings.warn(
                    f"{share:.1%} of the plans of the coupling did not reach their "
                    f'tolerance (the column "{name}" of the record); they were used '
                    "as they are. Give it more max_iterations, a larger "
                    "regularisation or a looser tolerance.",
                    stacklevel=4,
                )


class _Loop:
    """The calls in flight, what has come of them, and what is done between them."""

    def __init__(self, run, folder, recorder, watch, held_out):
        self.run, self.folder, self.recorder, self.watch = run, folder, recorder, watch
        self.held_out, self.stopped = held_out, folder.stopped
        self.start, self.losses, self.pending = run.done, [], deque()
        self.unsolved, self.stop_by_any = UnsolvedPlans(), False
        self.speed = Speedometer(run.feed.batch_size)
        self.watch_every = run.config.watch_every or max(run.steps // 10, 1)
        # A good state to return to, where none is in a directory.
        self.good = None if folder.active else (0, _copy(run.leaves))
        self.copied = time.perf_counter()
        if recorder is not None and folder.active:
            recorder.rewind(self.start)

    def train(self, profile, progress) -> Fit:
        run, folder = self.run, self.folder
        guard = Preemption(run.feed.mesh) if folder.active else nullcontext()
        with (
            guard as preemption,
            progress_bar(run.steps, progress, run.done) as self.bar,
            closing(run.calls(run.steps)) as calls,
            Trace(profile) as trace,
        ):
            for fed, count in calls:
                first = run.done == self.start
                if first and (self.recorder is not None or progress):
                    self.speed.flops = run.flops(fed)
                trace.call()
                flags = preemption.flags() if preemption else None
                self.pending.append((run.done, count, run.advance(fed, count, flags)))
                self._between(count, preemption)
                if self.stopped:
                    break
            self._settle(0)
        folder.close()
        self.unsolved.warn()
        losses = np.concatenate(self.losses or [np.zeros(0, np.float32)])
        history = self.held_out.history
        return Fit(run.averaged(), run.state, losses, self.start, history, self.stopped)

    def _between(self, count, preemption):
        """What is due after a call of `count` steps."""
        run, folder = self.run, self.folder
        save, snap = folder.due(count)
        due = run.crossed(self.watch_every, count) or run.done == run.steps
        look = self.watch if due else None
        if validate := self.held_out.due(count):
            self.held_out.look()
        now = time.perf_counter()
        copy = self.good is not None and now - self.copied > _COPY_EVERY
        # What is kept or shown is known to be finite first.
        kept = save or snap or look or copy or validate
        self._settle(0 if kept else _AHEAD - 1)
        stop = preemption is not None and preemption.requested(self.stop_by_any)
        if stop:
            self._settle(0)
        if copy:
            self.good, self.copied = (run.done, _copy(run.leaves)), now
        if snap:
            folder.snapshot()
        if validate:
            folder.keep_history(self.held_out.history)
        if save or stop:
            folder.save()
        if stop and run.done < run.steps:
            folder.close()
            raise Preempted(
                f"preempted: step {run.done} of {run.steps} is saved in "
                f"{folder.place}; the same command continues from there.",
                run.done,
            )
        answer = None if look is None else look(run.done, run.averaged(copy=True))
        if isinstance(answer, bool | np.bool_) and answer:
            self.stopped = "by `watch`, which returned True"
        self.stopped = self.stopped or self.held_out.ended()
        if self.stopped and run.done < run.steps:
            folder.stop(self.stopped)

    def _settle(self, left):
        """Wait for the oldest calls, until `left` are in flight, and record them."""
        while len(self.pending) > left:
            first, count, metrics = self.pending.popleft()
            metrics = jax.device_get(metrics)
            self.stop_by_any |= bool(metrics.pop("stop", False))
            finite = np.logical_and.reduce([np.isfinite(m) for m in metrics.values()])
            if not finite.all():
                bad = int(np.argmin(finite))
                self._fail(first + bad, {k: m[bad] for k, m in metrics.items()})
            self.losses.append(metrics["loss"])
            self.unsolved.add(metrics)
            metrics.pop("update_norm")
            names = ("loss", "grad_norm", *metrics)
            means = {name: float(metrics[name].mean()) for name in names}
            if (held := self.held_out.history.get(first + count)) is not None:
                means["validation_loss"] = held
            rates = self.speed.passed(count)
            self.bar.set_postfix_str(_postfix(means["loss"], rates), refresh=False)
            self.bar.update(count)
            if self.recorder is not None:
                self.recorder.row(step=first + count, **means)
                self.recorder.timing(step=first + count, **rates)

    def _fail(self, step, metrics):
        """Return to a good state, advance to the one before `step`, and raise."""
        run, folder, saved = self.run, self.folder, None
        if self.good is None:
            folder.checkpoints.wait()
            folder.restore()
        else:
            run.done, run.leaves = self.good
        run.replay(step)
        if folder.active:
            saved = checkpoint.save(folder.place / "last_good", run.state, replace=True)
        place = f"saved in {saved}" if saved else "it is in this error's `state`"
        raise NonFiniteError(
            f"step {step} gave a loss of {metrics['loss']}, or a gradient or update "
            "that is not finite; training stopped there. "
            f"{cause(run, step, metrics)} The last good state, after {step} steps, is "
            f"kept: {place}.",
            step,
            run.state,
            saved,
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
