"""A job from its first step to its rows: run, saved, resumed, preempted."""

import dataclasses
import json
import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..runs.checkpoint import Checkpoints
from ..runs.recorder import progress_bar, write_whole
from ..training.fit import UnsolvedPlans
from ..training.preemption import Preempted, Preemption
from .multihost import any_process
from .program import Program, TooLargeError
from .space import Job, Point
from .trial import Training, bind, check_metric, outcome

_AHEAD = 2  # calls in flight; more can deadlock collectives on simulated devices


@dataclasses.dataclass(frozen=True)
class JobOptions:
    """How jobs are run, see `Sweep` and `sweep`.

    At the steps `rungs(total, multiple)` the trials `stop(step, {trial: value})` end.
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

    **Arguments:**
    - `job`, `options`: what is run, and how.
    - `directory`: where the job is saved, and from which it continues; none.
    - `title`: of its progress bar; none.

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
    """The state of a job that is not on the device; plain JSON.

    `alive` are the places in the job of the trials that the program still has. By place
    are `ended`, the status of those that went non-finite or were stopped, and `tail`,
    the sum and the number of the losses of the last tenth.
    """

    step: int
    alive: list[int]
    ended: dict[int, dict[str, Any]]
    tail: dict[int, list[float]]

    @classmethod
    def read(cls, text: str) -> "_Progress":
        """From JSON, whose keys are text."""
        raw = json.loads(text)
        for name in ("ended", "tail"):
            raw[name] = {int(place): value for place, value in raw[name].items()}
        return cls(**raw)


class _Run:
    """Trials of one program from begin to end."""

    def __init__(self, trial, points: Sequence[Point], options, directory, title):
        self.points, self.options, self.title = points, options, title
        seen = outcome(trial, points[0].values, options.metric)
        self.trains = isinstance(seen, Training)
        self.program = Program(trial, points, options.mesh, options.lanes)
        self.directory, self.pending = directory, deque()
        self.checkpoints: Any = None
        if directory is not None:
            self.checkpoints = Checkpoints(directory / "checkpoints", keep=2)
        self.latest: dict[int, float] = {}
        self.unsolved = UnsolvedPlans()
        places = list(range(len(points)))
        self.now = _Progress(0, places, {}, {i: [0.0, 0.0] for i in places})

    def rows(self) -> list[dict[str, Any]]:
        """Run, and return a row for each trial."""
        places = range(len(self.points))
        if not self.trains:
            metrics = self.program.evaluate().items()
            return [self._row(i, {k: float(v[i]) for k, v in metrics}) for i in places]
        self._train()
        self.unsolved.warn()
        found = self._measure() if self._left() else {}
        return [self._row(i, found.get(i, {})) for i in places]

    def _row(self, i, metrics):
        """The trial at place i as a row: its values, how it ended, its metrics."""
        status: dict[str, Any] = {"status": "ok"}
        if self.trains:
            status["step"] = self.now.step
        if i in self.now.ended:
            status = dict(self.now.ended[i])
            metrics = status.pop("metrics", {})
        elif not all(map(math.isfinite, metrics.values())):
            status["status"] = "non-finite"
        return self.points[i].row | status | metrics

    def _train(self):
        leaves = self._restore(self.program.begin())
        spec, options = self.program.spec, self.options
        save_every = options.save_every or max(spec.steps // 10, 1)
        rungs = options.rungs(spec.steps, spec.steps_per_call) if options.rungs else []
        guard = saved = nullcontext()
        if self.checkpoints is not None:
            guard, saved = Preemption(None), closing(self.checkpoints)
        bar = progress_bar(spec.steps, options.progress, self.now.step)
        bar.set_description_str(self.title, refresh=False)
        with guard as preemption, bar, saved:
            while self.now.step < spec.steps and self._left():
                step = self.now.step
                count = min(spec.steps_per_call, spec.steps - step)
                leaves, metrics = self.program.advance(leaves, step, count)
                self.pending.append((step, list(self.now.alive), metrics))
                self.now.step = end = step + count
                rung, last = end in rungs, end == spec.steps
                save = end // save_every > step // save_every and not last
                self._settle(0 if rung or save or last else _AHEAD - 1)
                bar.update(count)
                stop = preemption is not None and any_process(
                    preemption.requested(False)
                )
                if rung:
                    leaves = self._compare(leaves, end)
                if self.checkpoints is not None and (save or stop):
                    self._settle(0)
                    self._save(leaves)
                if stop and end < spec.steps:
                    raise Preempted(
                        f"preempted: step {end} of {spec.steps} of {self.title} is "
                        "saved; the same command continues from there.",
                        end,
                    )
            self._settle(0)
        self.leaves = leaves

    def _left(self):
        """(row in the program, place in the job) of the trials that have not ended."""
        rows = enumerate(self.now.alive)
        return [(row, place) for row, place in rows if place not in self.now.ended]

    def _settle(self, left):
        """Wait for the oldest calls, until `left` are in flight, and note them."""
        while len(self.pending) > left:
            self._note(*self.pending.popleft())

    def _note(self, first, alive, metrics):
        """Note the losses of a call, and which trials went non-finite."""
        metrics = self.program.to_host(metrics)
        # A call that was under way when trials left has more rows than are alive now.
        finite = np.logical_and.reduce([np.isfinite(m) for m in metrics.values()])
        losses, steps = metrics["loss"], self.program.spec.steps
        late = first + np.arange(finite.shape[1]) >= min(0.9 * steps, steps - 1)
        for row, place in enumerate(alive):
            if place in self.now.ended:
                continue
            if not finite[row].all():
                bad = first + int(np.argmin(finite[row]))
                self.now.ended[place] = {"status": "non-finite", "step": bad}
                continue
            self.unsolved.add({name: values[row] for name, values in metrics.items()})
            self.latest[place] = float(losses[row].mean(dtype=np.float64))
            self.now.tail[place][0] += float(losses[row][late].sum(dtype=np.float64))
            self.now.tail[place][1] += int(late.sum())

    def _measure(self):
        """Metrics of all trials that are left, by place."""
        raw, found = self.program.judge(self.leaves), {}
        measure = self.program.spec.measure or (lambda metrics: metrics)
        rung = self.now.step < self.program.spec.steps
        for row, place in self._left():
            total, number = self.now.tail[place]
            metrics = dict(measure(jax.tree.map(lambda a, row=row: a[row], raw)))
            found[place] = {k: float(v) for k, v in metrics.items()}
            # At a rung that of the last call, which a resumed run has as well.
            found[place]["loss"] = self.latest[place] if rung else total / number
            check_metric(self.options.metric, list(found[place]))
        return found

    def _compare(self, leaves, step):
        """At a rung: measure all trials, and stop the worse ones."""
        self.leaves = leaves
        found, metric = self._measure(), self.options.metric
        numbers = {place: self.points[place].number for place in found}
        values = {numbers[i]: m.get(metric, math.nan) for i, m in found.items()}
        out = self.options.stop(step, values)
        stopped = {"status": "stopped", "step": step}
        for place, metrics in found.items():
            if numbers[place] in out:
                self.now.ended[place] = stopped | {"metrics": metrics}
        left = [row for row, _ in self._left()]
        # A narrower program is compiled anew: only where it saves half of the work.
        width = -(-len(left) // self.program.devices) * self.program.devices
        if left and 2 * width <= self.program.width:
            self.program, leaves = self.program.keep(leaves, left)
            self.now.alive = [self.now.alive[row] for row in left]
        return leaves

    def _save(self, leaves):
        """The arrays, and before them, in a file beside them, the progress."""
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            text = json.dumps(dataclasses.asdict(self.now))
            write_whole(self._beside(self.now.step), text)
        self.checkpoints.save(self.now.step, _named(leaves))
        if jax.process_index() == 0:
            steps = [*self.checkpoints.steps()[-2:], self.now.step]
            kept = {self._beside(step) for step in steps}
            for old in set(self.directory.glob("progress-*.json")) - kept:
                old.unlink(missing_ok=True)

    def _beside(self, step):
        return self.directory / f"progress-{step}.json"

    def _restore(self, leaves):
        """The last whole checkpoint, or the beginning."""
        for step in reversed(self.checkpoints.steps() if self.checkpoints else []):
            try:
                now = _Progress.read(self._beside(step).read_text())
                program, like = self.program, leaves
                if len(now.alive) < len(self.points):
                    program, like = program.keep(leaves, now.alive)
                arrays = self.checkpoints.read(step, _named(like))
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
