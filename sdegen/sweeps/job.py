"""A job from its first step to its rows: run, saved, resumed, preempted."""

import dataclasses
import json
import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..runs.checkpoint import Checkpoints
from ..runs.recorder import progress_bar
from ..training.fit import UnsolvedPlans
from ..training.preemption import Preempted, Preemption
from .folder import write
from .multihost import any_process
from .program import Program, TooLargeError
from .space import Job, Point
from .trial import Training, bind, check_metric, outcome

_AHEAD = 2  # calls in flight; more can deadlock collectives on simulated devices


@dataclasses.dataclass(frozen=True)
class JobOptions:
    """How jobs are run: see `Sweep` and `sweep`.

    Trials are compared at the steps of `rungs(total, multiple)`, and those of
    `stop(step, {trial: value})` then end.
    """

    trial: Callable
    config: Any = None
    metric: str | None = None
    mesh: Any = None
    lanes: int | None = None
    save_every: int | None = None
    rungs: Callable[[int, int], list[int]] | None = None
    stop: Callable[[int, dict[int, float]], set[int]] | None = None
    progress: bool = True


def run_job(
    job: Job, options: JobOptions, directory: Path | None = None, title: str = ""
) -> list[dict[str, Any]]:
    """The rows of a job's trials, in their order.

    With a `directory` the job is saved there, and continues from there.

    **Raises:** `Preempted` after SIGTERM, once the job is saved.
    """
    trial = bind(options.trial, options.config, job.static)
    return _run(trial, job.points, options, directory, title)


def _run(trial, points, options, directory, title):
    try:
        return _Run(trial, points, options, directory, title).rows()
    except TooLargeError:
        devices = 1 if options.mesh is None else options.mesh.devices.size
        if len(points) <= devices:
            raise
    # As many at a time as the memory holds, one half after the other.
    middle = -(-len(points) // (2 * devices)) * devices
    rows = []
    for part in (points[:middle], points[middle:]):
        name = f"trials-{part[0].number}-{part[-1].number}"
        place = None if directory is None else directory / name
        rows += _run(trial, part, options, place, title)
    return rows


@dataclasses.dataclass
class _Progress:
    """The state of a job that is not on the device; plain JSON."""

    step: int
    alive: list[int]
    """Places in the job of the trials that the program still has, in its order."""
    ended: dict[int, dict[str, Any]]
    """By place: the status of a trial that went non-finite or was stopped."""
    tail: dict[int, list[float]]
    """By place: the sum and the number of the losses of the last tenth."""

    @classmethod
    def read(cls, text: str) -> "_Progress":
        """From JSON, whose keys are text."""
        raw = json.loads(text)
        ended, tail = raw["ended"], raw["tail"]
        return cls(
            raw["step"],
            raw["alive"],
            {int(k): v for k, v in ended.items()},
            {int(k): v for k, v in tail.items()},
        )


class _Run:
    """Trials of one program from begin to end."""

    def __init__(self, trial, points: Sequence[Point], options, directory, title):
        self.points, self.options, self.title = points, options, title
        seen = outcome(trial, points[0].values, options.metric)
        self.trains = isinstance(seen, Training)
        self.program = Program(trial, points, options.mesh, options.lanes)
        self.directory, self.pending = directory, deque()
        self.latest: dict[int, float] = {}
        self.unsolved = UnsolvedPlans()
        places = list(range(len(points)))
        self.now = _Progress(0, places, {}, {i: [0.0, 0.0] for i in places})

    def rows(self) -> list[dict[str, Any]]:
        """Run, and return a row for each trial."""
        if not self.trains:
            metrics = self.program.evaluate()
            return [self._row(i, _pick(metrics, i)) for i in range(len(self.points))]
        self._train()
        self.unsolved.warn()
        alive = [i for i in self.now.alive if i not in self.now.ended]
        found = self._measure() if alive else {}
        return [self._row(i, found.get(i, {})) for i in range(len(self.points))]

    def _row(self, i, metrics):
        """The trial at place i as a row: its values, how it ended, its metrics."""
        status = {"status": "ok"}
        if self.trains:
            status["step"] = self.now.step
        if i in self.now.ended:
            metrics = self.now.ended[i].get("metrics", {})
            status |= {k: v for k, v in self.now.ended[i].items() if k != "metrics"}
        elif not all(math.isfinite(value) for value in metrics.values()):
            status["status"] = "non-finite"
        return self.points[i].row | status | metrics

    def _train(self):
        leaves, spec = self.program.begin(), self.program.spec
        leaves = self._restore(leaves)
        save_every = self.options.save_every or max(spec.steps // 10, 1)
        rungs = []
        if self.options.rungs is not None:
            rungs = self.options.rungs(spec.steps, spec.steps_per_call)
        guard = Preemption(None) if self.directory is not None else nullcontext()
        bar = progress_bar(spec.steps, self.options.progress, self.now.step)
        bar.set_description_str(self.title, refresh=False)
        with guard as preemption, bar, self._checkpoints() as checkpoints:
            while self.now.step < spec.steps and self._anyone():
                step = self.now.step
                count = min(spec.steps_per_call, spec.steps - step)
                leaves, metrics = self.program.advance(leaves, step, count)
                self.pending.append((step, list(self.now.alive), metrics))
                self.now.step = end = step + count
                rung, last = end in rungs, end == spec.steps
                save = end // save_every > step // save_every and not last
                bound = 0 if rung or save or last else _AHEAD - 1
                while len(self.pending) > bound:
                    self._settle()
                bar.update(count)
                stop = preemption is not None and any_process(
                    preemption.requested(False)
                )
                if rung:
                    leaves = self._compare(leaves, end)
                if checkpoints is not None and (save or stop):
                    while self.pending:
                        self._settle()
                    self._save(checkpoints, leaves)
                if stop and end < spec.steps:
                    raise Preempted(
                        f"preempted: step {end} of {spec.steps} of {self.title} is "
                        "saved; the same command continues from there.",
                        end,
                    )
            while self.pending:
                self._settle()
        self.leaves = leaves

    def _anyone(self):
        return any(i not in self.now.ended for i in self.now.alive)

    def _settle(self):
        """Wait for the oldest call in flight: note non-finite trials, and losses."""
        first, alive, metrics = self.pending.popleft()
        metrics = self.program.to_host(metrics)
        # A call that was under way when trials left has more rows than are alive now.
        finite = np.logical_and.reduce([np.isfinite(m) for m in metrics.values()])
        steps = self.program.spec.steps
        late = first + np.arange(finite.shape[1]) >= min(0.9 * steps, steps - 1)
        for row, place in enumerate(alive):
            if place in self.now.ended:
                continue
            if not finite[row].all():
                bad = first + int(np.argmin(finite[row]))
                self.now.ended[place] = {"status": "non-finite", "step": bad}
                continue
            self.unsolved.add({name: values[row] for name, values in metrics.items()})
            self.latest[place] = float(metrics["loss"][row].mean(dtype=np.float64))
            losses = metrics["loss"][row][late]
            self.now.tail[place][0] += float(losses.sum(dtype=np.float64))
            self.now.tail[place][1] += len(losses)

    def _measure(self):
        """Metrics of all trials that are left, by place."""
        raw, found = self.program.judge(self.leaves), {}
        measure = self.program.spec.measure or (lambda metrics: metrics)
        for row, place in enumerate(self.now.alive):
            if place in self.now.ended:
                continue
            total, number = self.now.tail[place]
            rung = self.now.step < self.program.spec.steps
            metrics = dict(measure(jax.tree.map(lambda a, row=row: a[row], raw)))
            found[place] = {k: float(v) for k, v in metrics.items()}
            # At a rung that of the last call, which a resumed run has as well.
            found[place]["loss"] = self.latest[place] if rung else total / number
            check_metric(self.options.metric, list(found[place]))
        return found

    def _compare(self, leaves, step):
        """At a rung: measure all trials, and stop the worse ones."""
        self.leaves = leaves
        metric = self.options.metric
        found = self._measure()
        values = {
            self.points[i].number: m.get(metric, math.nan) for i, m in found.items()
        }
        out = self.options.stop(step, values)
        for place, metrics in found.items():
            if self.points[place].number in out:
                self.now.ended[place] = {
                    "status": "stopped",
                    "step": step,
                    "metrics": metrics,
                }
        left = [row for row, i in enumerate(self.now.alive) if i not in self.now.ended]
        # A narrower program is compiled anew: only where it saves half of the work.
        width = -(-len(left) // self.program.devices) * self.program.devices
        if left and 2 * width <= self.program.width:
            self.program, leaves = self.program.keep(leaves, left)
            self.now.alive = [self.now.alive[row] for row in left]
        return leaves

    @contextmanager
    def _checkpoints(self):
        if self.directory is None:
            yield None
            return
        checkpoints = Checkpoints(self.directory / "checkpoints", keep=2)
        try:
            yield checkpoints
        finally:
            checkpoints.close()

    def _save(self, checkpoints, leaves):
        """The arrays, and before them, in a file beside them, the progress."""
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            text = json.dumps(dataclasses.asdict(self.now))
            write(self._beside(self.now.step), text)
        checkpoints.save(self.now.step, _named(leaves))
        if jax.process_index() == 0:
            kept = {self._beside(step) for step in checkpoints.steps()[-2:]}
            kept.add(self._beside(self.now.step))
            for old in set(self.directory.glob("progress-*.json")) - kept:
                old.unlink(missing_ok=True)

    def _beside(self, step):
        return self.directory / f"progress-{step}.json"

    def _restore(self, leaves):
        """The last whole checkpoint, or the beginning."""
        if self.directory is None:
            return leaves
        checkpoints = Checkpoints(self.directory / "checkpoints", keep=2)
        for step in reversed(checkpoints.steps()):
            try:
                now = _Progress.read(self._beside(step).read_text())
                program, like = self.program, leaves
                if len(now.alive) < len(self.points):
                    program, like = program.keep(leaves, now.alive)
                arrays = checkpoints.read(step, _named(like))
            except (OSError, ValueError, KeyError) as error:
                warnings.warn(
                    f"the checkpoint of step {step} in {self.directory} cannot be read "
                    f"({error!s:.120}); an earlier one, or the beginning, is taken.",
                    stacklevel=2,
                )
                continue
            self.program, self.now = program, now
            return list(arrays.values())
        return leaves


def _named(leaves):
    return {f"{i:04d}": leaf for i, leaf in enumerate(leaves)}


def _pick(metrics, i):
    return {name: float(value[i]) for name, value in metrics.items()}
