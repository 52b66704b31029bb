"""`sweep`: every trial of a space, in this process or as one of several shards."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ..runs.recorder import first_line
from .folder import Folder
from .halving import Halving
from .job import JobOptions, run_job
from .results import Results, status_counts
from .space import SEED, Job, Point, Space
from .trial import check_names


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is swept; a sweep file makes one.

    **Arguments:**
    - `trial`: (key, **hyperparameters) -> metrics or a `Training`; with a config
      (key, config).
    - `space`: axes and their values, see `sdegen.sweeps.space`.
    - `config`: a dataclass whose fields the axes name by dotted paths; none.
    - `metric`, `goal`: by which trials are ranked, and "min" (the default) or "max".
    - `trials`: points drawn at random; by default the grid.
    - `chunk`: the most trials to one program; all by default.
    - `lanes`: trials side by side on a device, the others after them; all by default,
      and on a CPU four, which is faster there and takes less memory.
    - `halving`: a `Halving`, which stops the worse trials early; none.
    - `seed`: of the points drawn at random; 0.
    """

    trial: Callable
    space: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    _: dataclasses.KW_ONLY
    config: Any = None
    metric: str | None = None
    goal: str = "min"
    trials: int | None = None
    chunk: int | None = None
    lanes: int | None = None
    halving: Halving | None = None
    seed: int = 0
    axes: Space = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "axes", Space(self.space))
        check_names(self.trial, self.config, self.axes)
        if self.goal not in ("min", "max"):
            raise ValueError(f'goal is "min" or "max", got {self.goal!r}.')
        for name in ("trials", "chunk", "lanes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}.")
        if self.halving is not None and self.metric is None:
            raise ValueError("halving compares trials: say by which metric=.")

    def points(self) -> list[Point]:
        """The trials: the grid, or `trials` points drawn at random, with every seed."""
        if self.trials is None:
            return self.axes.grid()
        return self.axes.draw(self.trials, self.seed)

    def jobs(self, parts: int = 1) -> list[Job]:
        """The trials as programs: at least `parts`, if there are so many trials."""
        points, chunk = self.points(), self.chunk
        if chunk is None and parts > 1:
            chunk = -(-len(points) // parts)
        return self.axes.jobs(points, chunk)

    def job_options(self, **options: Any) -> JobOptions:
        """How the jobs of this sweep are run."""
        if self.halving is not None:
            halving, goal = self.halving, self.goal
            options.setdefault("rungs", halving.steps)
            options.setdefault("stop", lambda _, values: halving.stop(values, goal))
        names = ("trial", "config", "metric", "lanes")
        return JobOptions(**{name: getattr(self, name) for name in names}, **options)

    def identity(self, **more: Any) -> dict[str, Any]:
        """What the numbers of the sweep depend on."""
        # Its name alone: a file that is run and one that is imported differ in theirs.
        trial = self.trial.__qualname__.rpartition(".")[2]
        names = ("config", "metric", "goal", "trials", "halving", "seed")
        fields = {name: getattr(self, name) for name in names}
        return {"trial": trial, "space": self.axes.describe()} | fields | more

    def results(self, rows: Sequence[dict[str, Any]]) -> Results:
        """Rows of this sweep as a table."""
        names = dict.fromkeys(name for part in self.axes.parts for name in part)
        axes = [name for name in names if name != SEED]
        return Results(rows, axes, self.metric, self.goal)


def sweep(
    trial: Callable,
    space: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    mesh: Mesh | None = None,
    directory: str | Path | None = None,
    save_every: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Results:
    """Run `trial` for every point of `space`, as many at once as one program holds.

    The trial is traced once, and does for each point what it would do alone. One that
    goes non-finite is reported and does not affect the others.

    **Arguments:**
    - `trial`, `space`, `options`: see `Sweep`.
    - `mesh`: the trials are split over all of its devices; one device by default.
    - `directory`: where finished jobs and the states of a job under way are kept, and
      from which the same sweep continues; none.
    - `save_every`: steps between checkpoints of a job; ten checkpoints by default.
    - `progress`: whether to show a progress bar; yes.

    **Raises:** ValueError for a space or a trial that does not fit, before anything
    runs; `Preempted` after SIGTERM with a `directory`, once all is saved.
    """
    how = {"mesh": mesh, "save_every": save_every, "progress": progress}
    return run(Sweep(trial, space, **options), directory=directory, **how)


def run(
    plan: Sweep,
    *,
    mesh: Mesh | None = None,
    directory: str | Path | None = None,
    shard: tuple[int, int] = (0, 1),
    save_every: int | None = None,
    progress: bool = True,
    watch: Callable[[Results], None] | None = None,
) -> Results:
    """Run the jobs of shard i of n, which are the jobs j with j % n = i, in order.

    **Arguments:**
    - `plan`: the sweep.
    - `mesh`, `directory`, `save_every`, `progress`: see `sweep`.
    - `shard`: (i, n); the shards need nothing but the directory, which they share.
    - `watch`: called with the results so far after every job; none.

    **Returns:** all results that are there, those of other shards too.
    """
    index, parts = shard
    if not 0 <= index < parts:
        raise ValueError(f"a shard i/n has 0 <= i < n, as in 0/4, got {index}/{parts}.")
    jobs, folder, rows = plan.jobs(parts), None, []
    if directory is not None:
        folder = Folder(directory, plan.identity(chunk=plan.chunk, parts=parts))
    options = plan.job_options(mesh=mesh, save_every=save_every, progress=progress)

    def results():
        if folder is not None:
            return plan.results(folder.rows())
        return plan.results(sorted(rows, key=lambda row: row["trial"]))

    for job in jobs[index::parts]:
        name = f"{job.number:04d}"
        found = None if folder is None else folder.finished(name)
        if found is None:
            found = run_and_keep(job, options, folder, name, len(jobs))
        rows += found
        if watch is not None and jax.process_index() == 0:
            watch(results())
    return results()


def run_and_keep(
    job: Job, options: JobOptions, folder: Folder | None, name: str, total: int | None
) -> list[dict[str, Any]]:
    """The rows of a job, one of `total`, kept in `folder` and noted in its ledger."""
    of, n = "" if total is None else f" of {total}", len(job.points)
    title = f"job {job.number + 1}{of}, {n} trial{'s' if n > 1 else ''}"
    if folder is None:
        return run_job(job, options, None, title)
    first, last = job.points[0], job.points[-1]
    static = ", ".join(f"{k}={v}" for k, v in first.static.items())
    what = f"trials {first.number} to {last.number}{' with ' if static else ''}{static}"
    again = "goes on" if folder.job(name).exists() else "begins"
    folder.log(f"job {name} {again}: {what}")
    try:
        rows = run_job(job, options, folder.job(name), title)
    except SystemExit:
        folder.log(f"job {name} preempted, saved")
        raise
    except Exception as error:
        folder.log(f"job {name} failed: {first_line(error)}")
        raise
    folder.finish(name, rows)
    folder.log(f"job {name} done: {status_counts(rows)}")
    return rows
