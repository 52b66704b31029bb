"""Workers that pull jobs from an Optuna storage: a SQLite file, or a database server.

Every worker is the same command; there is no driver that could be lost. What is to be
done stands in the storage as trials that wait, one for each *slot*: a job of the grid,
or a point that a sampler is to choose. A worker claims slots, which is atomic, sends
heartbeats while it works, and tells the results. A slot whose heartbeats stop waits
again, and whoever claims it goes on from the job's last checkpoint, because the folder
is shared. All that a worker does when it starts may be done twice.

With a sampler a worker claims several slots at once and runs their points as one
program; the first of them leads, and remembers which belong together.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from .folder import Folder
from .job import Orders
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
    """Work on `plan` until nothing is left to do, beside any number of other workers.

    **Arguments:** `directory`, shared by all workers; `storage`, an Optuna URL
    ("postgresql+psycopg://user@host/name"; default: a SQLite file in `directory`, for
    the processes of one machine); `sampler`, "tpe" or "random": draw `plan.trials`
    points from a storage that all workers learn from, `batch` of them at once as one
    program (default: the grid, job by job); `mesh`, see `sweep`; `heartbeat` and
    `grace`, seconds between signs of life, and without one until a slot is given to
    another worker; `watch`, called with the results so far after every job.

    A worker may be one process or an SPMD job of many: process 0 talks to the storage.

    **Returns:** all results. A job whose code raises is marked as failed, the others
    are done, and the first such error is raised at the end.
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
            orders = plan.orders(mesh=mesh, save_every=save_every, progress=progress)
            if sampler:
                orders = _compared_by_all(orders, plan, queue)
            try:
                rows = _rows(plan, folder, task, orders)
            except Exception as error:
                # The same on every process; the next job may well run.
                failed.append(error)
                if queue:
                    queue.failed(error)
                continue
            if queue:
                queue.tell(rows)
            if watch is not None and jax.process_index() == 0:
                watch(plan.results(folder.rows()))
    finally:
        if queue:
            queue.close()
    if failed:
        raise failed[0]
    return plan.results(folder.rows())


def _rows(plan, folder, task, orders):
    """The rows of a job, as they stand in the folder or as they are now computed."""
    points = tuple(Point(**point) for point in task["points"])
    job = Job(task["number"], plan.axes.static_values(points[0]), points)
    rows = broadcast(folder.finished(task["name"]))
    if rows is None:
        rows = run_and_keep(job, orders, folder, task["name"], task["total"])
    return rows


def _compared_by_all(orders: Orders, plan: Sweep, queue: Any) -> Orders:
    """Orders by which trials are compared with those of all workers."""
    if plan.halving is None:
        return orders

    def stop(step, values):
        found = queue.prune(step, values) if queue else None
        return set(broadcast(found))

    return dataclasses.replace(orders, stop=stop)
