"""Workers that pull jobs from an Optuna storage: a SQLite file, or a database server.

Every worker is the same command, without a driver. It claims slots of the storage (see
`queue.py`), sends heartbeats while it works, and reports the results. The worker that
claims a slot whose heartbeats have stopped continues from the job's last checkpoint,
because the folder is shared.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from .folder import Folder
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

    A worker may be an SPMD job of many processes: process 0 uses the storage.

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

    **Raises:** the first error of a job's code, once all other jobs are done.
    """
    if plan.trials is None and sampler is not None:
        raise ValueError("say how many points to choose: trials=50, or --trials 50.")
    if sampler not in (None, *SAMPLERS):
        raise ValueError(f"sampler is one of {', '.join(SAMPLERS)}, got {sampler!r}.")
    more = {"sampler": sampler} if sampler else {"chunk": plan.chunk}
    folder = Folder(directory, plan.identity(**more))
    url = storage or f"sqlite:///{folder.place / 'storage.db'}"
    queue: Any = None
    if jax.process_index() == 0:
        kind = Search if sampler else Grid
        queue = kind(plan, url, folder, sampler, batch, heartbeat, grace)
    options = {"mesh": mesh, "save_every": save_every, "progress": progress}
    if sampler and plan.halving is not None:

        def stop(step, values):
            """The trials to stop, compared with those of all workers."""
            return set(broadcast(queue.prune(step, values) if queue else None))

        options["stop"] = stop
    options, failed = plan.job_options(**options), []
    try:
        while (task := broadcast(queue.next() if queue else None)) is not None:
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
    rows = broadcast(folder.finished(task["name"]))
    if rows is not None:
        return rows
    points = tuple(Point(**point) for point in task["points"])
    job = Job(task["number"], plan.axes.static_values(points[0]), points)
    return run_and_keep(job, options, folder, task["name"], task["total"])
