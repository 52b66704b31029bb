"""Workers that pull jobs from an Optuna storage: a SQLite file, or a database server.

Every worker is the same command, without a driver. The storage holds a waiting trial
for each *slot*: a job of the grid, or a point that a sampler is to choose. A worker
claims slots, which is atomic, sends heartbeats while it works, and reports the results.
A slot whose heartbeats stop waits again, and the worker that claims it continues from
the job's last checkpoint, because the folder is shared. The start of a worker is
idempotent.

With a sampler a worker claims several slots at once and runs their points as one
program; the first slot holds the list of them.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from .folder import Folder
from .job import JobOptions
from .multihost import broadcast
from .queue import Grid
from .results import Results
from .run import Sweep, run_and_keep
from .sampled_queue import Search
from .space import Job, Point
from .storage import SAMPLERS


def work(
    plan: Sweep,
    directory: str | Path,
    *,
    storage: str | None = None,
    sampler: str | None = None,
    batch: int = 16,
    mesh: Mesh | None = None,
    heartbeat: int = 30,
    grace: int = 120,
    save_every: int | None = None,
    progress: bool = True,
    watch: Callable[[Results], None] | None = None,
) -> Results:
    """Run jobs of `plan` until none is left, beside any number of other workers.

    A worker may be one process or an SPMD job of many: process 0 uses the storage.

    **Arguments:**

    - `plan`: the sweep.
    - `directory`: shared by all workers.
    - `storage`: an Optuna URL, "postgresql+psycopg://user@host/name"; by default a
      SQLite file in `directory`, for the processes of one machine.
    - `sampler`: "tpe" or "random" chooses `plan.trials` points by the results of all
      workers; by default the jobs are those of the grid.
    - `batch`: points that a sampler chooses at once, run as one program; 16.
    - `mesh`, `save_every`, `progress`: see `sweep`.
    - `heartbeat`: seconds between heartbeats; 30.
    - `grace`: seconds without one until a slot is given to another worker; 120.
    - `watch`: called with the results so far after every job; none.

    **Returns:** all results.

    **Raises:** the first error of a job's code, once all other jobs are done.
    """
    if plan.trials is None and sampler is not None:
        raise ValueError(
            "a sampler needs to know how many points to choose: trials=50, or "
            "--trials 50."
        )
    if sampler not in (None, *SAMPLERS):
        raise ValueError(f"sampler is one of {', '.join(SAMPLERS)}, got {sampler!r}.")
    more = {"sampler": sampler} if sampler else {"chunk": plan.chunk}
    folder = Folder(directory, plan.identity(**more))
    url = storage or f"sqlite:///{folder.place / 'storage.db'}"
    queue = None
    if jax.process_index() == 0:
        kind = Search if sampler else Grid
        queue = kind(plan, url, folder, sampler, batch, heartbeat, grace)
    failed = []
    try:
        while (task := broadcast(queue.next() if queue else None)) is not None:
            options = plan.job_options(
                mesh=mesh, save_every=save_every, progress=progress
            )
            if sampler:
                options = _compared_by_all(options, plan, queue)
            try:
                rows = _rows(plan, folder, task, options)
            except Exception as error:
                # The same on every process; the next job may well run.
                failed.append(error)
                if queue:
                    queue.failed(error)
                continue
            if queue:
                queue.report(rows)
            if watch is not None and jax.process_index() == 0:
                watch(plan.results(folder.rows()))
    finally:
        if queue:
            queue.close()
    if failed:
        raise failed[0]
    return plan.results(folder.rows())


def _rows(plan, folder, task, options):
    """The rows of a job, as they stand in the folder or as they are now computed."""
    points = tuple(Point(**point) for point in task["points"])
    job = Job(task["number"], plan.axes.static_values(points[0]), points)
    rows = broadcast(folder.finished(task["name"]))
    if rows is None:
        rows = run_and_keep(job, options, folder, task["name"], task["total"])
    return rows


def _compared_by_all(options: JobOptions, plan: Sweep, queue: Any) -> JobOptions:
    """Options by which trials are compared with those of all workers."""
    if plan.halving is None:
        return options

    def stop(step, values):
        found = queue.prune(step, values) if queue else None
        return set(broadcast(found))

    return dataclasses.replace(options, stop=stop)
