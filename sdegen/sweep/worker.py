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
import itertools
import math
import random
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from .folder import Folder
from .job import Orders
from .results import Results
from .run import Sweep, run_and_keep
from .space import SEED, Between, Job, Point, Static
from .team import broadcast

SAMPLERS = ("tpe", "random")


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
        kind = _Search if sampler else _Grid
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


class _Queue:
    """The slots of a sweep in an Optuna storage, seen by process 0 of a worker."""

    def __init__(self, plan, url, folder, sampler, batch, heartbeat, grace):
        self.plan, self.folder, self.batch, self.grace = plan, folder, batch, grace
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.states = optuna.trial.TrialState
        self.optuna, self.mine, self.task = optuna, [], None
        self.storage = _storage(url, heartbeat, grace)
        pruner = optuna.pruners.NopPruner()
        if plan.halving is not None and sampler:
            pruner = optuna.pruners.SuccessiveHalvingPruner(
                reduction_factor=plan.halving.eta
            )
        self.study = optuna.create_study(
            storage=self.storage,
            study_name=str(folder.place.name),
            direction="minimize" if plan.goal == "min" else "maximize",
            sampler=_sampler(optuna, sampler),
            pruner=pruner,
            load_if_exists=True,
        )
        self.id = self.storage.get_study_id_from_name(self.study.study_name)
        self._check_identity()
        self._enqueue()
        self.life = _Life(self.storage, heartbeat)

    def _check_identity(self):
        held = self.study.user_attrs.get("sweep")
        if held is None:
            self.study.set_user_attr("sweep", self.folder.identity)
        elif held != self.folder.identity:
            raise ValueError(
                f"the storage holds another sweep called {self.study.study_name!r}. "
                "Choose a folder of another name, or another storage."
            )

    def _enqueue(self):
        """A trial that waits for every slot that has none."""
        there = {trial.user_attrs.get("slot") for trial in self._trials()}
        for slot in range(self.slots()):
            if slot not in there:
                self.study.add_trial(
                    self.optuna.create_trial(
                        state=self.states.WAITING, user_attrs={"slot": slot}
                    )
                )

    def _trials(self):
        # Without a copy of each: they are only looked at.
        return self.storage.get_all_trials(self.id, deepcopy=False)

    def _live(self) -> dict[int, Any]:
        """For each slot the trial that counts: the first that has not been lost."""
        live = {}
        for trial in self._trials():
            slot = trial.user_attrs.get("slot")
            lost = trial.state == self.states.FAIL and "error" not in trial.user_attrs
            if slot is not None and not lost:
                live.setdefault(slot, trial)
        return live

    def next(self) -> dict[str, Any] | None:
        """The next job of this worker, as plain JSON; None when all slots are done."""
        told = False
        while True:
            self.optuna.storages.fail_stale_trials(self.study)
            live = self._live()
            if self._claim(live):
                return self.task
            if all(trial.state.is_finished() for trial in live.values()):
                return None
            if not told:
                left = [s for s, t in live.items() if not t.state.is_finished()]
                self.folder.log(
                    f"waits: {len(left)} jobs are with other workers, and become free "
                    f"if one is silent for {self.grace} s"
                )
                told = True
            time.sleep(random.uniform(0.5, 1.0) * min(self.grace / 3, 5.0))

    def _take(self, trial) -> bool:
        """Claim one waiting trial; False if another worker was faster."""
        errors = self.optuna.exceptions
        # A sign of life first: killed between the two, the claim would be for ever.
        self.storage.record_heartbeat(trial._trial_id)
        try:
            got = self.storage.set_trial_state_values(
                trial._trial_id, state=self.states.RUNNING
            )
        except errors.UpdateFinishedTrialError:
            got = False
        if got:
            self.mine.append(trial._trial_id)
            self.life.add(trial._trial_id)
        return got

    def _finish(self, id_: int, state, values=None):
        try:
            self.storage.set_trial_state_values(id_, state, values)
        except self.optuna.exceptions.UpdateFinishedTrialError:
            # Taken for dead by another worker, which finds the rows in the folder.
            pass

    def _release(self):
        self.life.clear()
        self.mine = []

    def failed(self, error: Exception) -> None:
        """The job at hand raised: nobody tries it again."""
        for id_ in self.mine:
            self.storage.set_trial_user_attr(id_, "error", str(error)[:500])
            self._finish(id_, self.states.FAIL)
        self._release()

    def close(self) -> None:
        """Hand back what is claimed, for others to go on with, and end."""
        for id_ in self.mine:
            trial = self.storage.get_trial(id_)
            if not trial.state.is_finished():
                self._finish(id_, self.states.FAIL)
                self.storage.get_heartbeat_stale_trial_callback()(self.study, trial)
        self._release()
        self.life.close()
        self.storage.remove_session()


class _Grid(_Queue):
    """A slot is a job of the grid, whose points are known."""

    def slots(self) -> int:
        """The number of jobs."""
        self.jobs = self.plan.jobs()
        return len(self.jobs)

    def _claim(self, live):
        for slot, trial in sorted(live.items()):
            if trial.state == self.states.WAITING and self._take(trial):
                self.task = {
                    "name": f"{slot:04d}",
                    "number": slot,
                    "total": len(self.jobs),
                    "points": [dataclasses.asdict(p) for p in self.jobs[slot].points],
                }
                return True
        return False

    def tell(self, rows) -> None:
        """Done: the value of a job is its best trial's."""
        best = _best(rows, self.plan)
        for id_ in self.mine:
            if best is None:
                self._finish(id_, self.states.PRUNED)
            else:
                self._finish(id_, self.states.COMPLETE, [best])
        self._release()


class _Search(_Queue):
    """A slot is a point that the sampler chooses."""

    def slots(self) -> int:
        """The number of points."""
        if len(self.plan.axes.parts) > 1:
            raise ValueError(
                "a sampler needs one space, got a list of several. Sweep over them one "
                "by one, or as a grid."
            )
        if self.plan.metric is None:
            raise ValueError("a sampler compares trials: say by which metric=.")
        return self.plan.trials

    def _claim(self, live):
        reserved = {}
        for slot, trial in live.items():
            if not trial.state.is_finished():
                for member in trial.user_attrs.get("batch", ()):
                    reserved[member] = slot
        # A batch that somebody lost goes on as it was.
        for slot, trial in sorted(live.items()):
            if trial.state == self.states.WAITING and "batch" in trial.user_attrs:
                if self._take(trial):
                    self._gather(trial.user_attrs["batch"], slot)
                    return self._begin(trial.user_attrs["batch"])
        taken = []
        for slot, trial in sorted(live.items()):
            if len(taken) < self.batch and slot not in reserved:
                if trial.state == self.states.WAITING and self._take(trial):
                    taken.append((slot, trial))
        if not taken:
            return False
        groups: dict[str, list] = {}
        for slot, trial in taken:
            static = self._choose(trial._trial_id)
            groups.setdefault(str(sorted(static.items())), []).append((slot, trial))
        first, *others = sorted(groups.values(), key=len, reverse=True)
        # Other programs are for whoever comes next: their points are chosen already.
        for slot, trial in itertools.chain(*others):
            self._give_back(trial)
        members = [slot for slot, _ in first]
        self.storage.set_trial_user_attr(first[0][1]._trial_id, "batch", members)
        return self._begin(members)

    def _gather(self, members, lead):
        """Claim the rest of a batch, whose heartbeats end when its leader's did."""
        while True:
            self.optuna.storages.fail_stale_trials(self.study)
            live = self._live()
            rest = [live[slot] for slot in members if slot != lead]
            for trial in rest:
                if trial.state == self.states.WAITING:
                    self._take(trial)
            others = [
                t
                for t in rest
                if not t.state.is_finished() and t._trial_id not in self.mine
            ]
            if not others:
                return
            time.sleep(min(self.grace / 10, 1.0))

    def _give_back(self, trial):
        held = self.storage.get_trial(trial._trial_id)
        self.life.remove(trial._trial_id)
        self.mine.remove(trial._trial_id)
        self._finish(trial._trial_id, self.states.FAIL)
        self.storage.get_heartbeat_stale_trial_callback()(self.study, held)

    def _choose(self, id_: int) -> dict[str, str]:
        """Let the sampler choose the point of a slot, if it has not yet."""
        trial, static = self.optuna.trial.Trial(self.study, id_), {}
        for name, axis in self.plan.axes.parts[0].items():
            if name == SEED:
                continue
            if isinstance(axis, Between):
                trial.suggest_float(name, axis.low, axis.high, log=axis.log)
            elif isinstance(axis, Static):
                static[name] = trial.suggest_categorical(name, list(axis.values))
            else:
                trial.suggest_categorical(name, axis)
        return static

    def _begin(self, members):
        live, part = self._live(), self.plan.axes.parts[0]
        seeds, points = part.get(SEED, [0]), []
        self.slot = {}
        for slot in members:
            params = live[slot].params
            static = {k: v for k, v in params.items() if isinstance(part[k], Static)}
            values = {k: v for k, v in params.items() if k not in static}
            for k, seed in enumerate(seeds):
                number = slot * len(seeds) + k
                self.slot[number] = slot
                points.append(Point(number, values, static, seed))
        self.ids = {slot: live[slot]._trial_id for slot in members}
        self.task = {
            "name": f"batch-{members[0]:04d}",
            "number": members[0],
            "total": None,
            "points": [dataclasses.asdict(point) for point in points],
        }
        return True

    def _means(self, values):
        """The mean over the seeds of every slot; NaN if one of them is not finite."""
        several: dict[int, list[float]] = {}
        for number, value in values.items():
            several.setdefault(self.slot[number], []).append(value)
        return {slot: sum(all_) / len(all_) for slot, all_ in several.items()}

    def prune(self, step, values) -> list[int]:
        """Who stops at a rung, compared with the points of all workers."""
        out = set()
        for slot, value in self._means(values).items():
            if not math.isfinite(value):
                out.add(slot)
                continue
            self.storage.set_trial_intermediate_value(self.ids[slot], step, value)
            trial = self.storage.get_trial(self.ids[slot])
            if self.study.pruner.prune(self.study, trial):
                out.add(slot)
        return [number for number in values if self.slot[number] in out]

    def tell(self, rows) -> None:
        """Every point's mean over its seeds."""
        metric, values = self.plan.metric, {}
        for row in rows:
            fine = row["status"] == "ok"
            values[row["trial"]] = row.get(metric, math.nan) if fine else math.nan
        for slot, value in self._means(values).items():
            if value is not None and math.isfinite(value):
                self._finish(self.ids[slot], self.states.COMPLETE, [value])
            else:
                self._finish(self.ids[slot], self.states.PRUNED)
        self._release()


class _Life:
    """A thread that sends heartbeats for the claimed trials."""

    def __init__(self, storage, interval):
        self._storage, self._interval = storage, interval
        self._ids: set[int] = set()
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self):
        while not self._end.wait(self._interval):
            with self._lock:
                ids = list(self._ids)
            for id_ in ids:
                try:
                    self._storage.record_heartbeat(id_)
                except Exception as error:  # a server that is restarted, say
                    warnings.warn(f"no heartbeat: {error!s:.200}", stacklevel=2)
        self._storage.remove_session()

    def add(self, id_):
        with self._lock:
            self._ids.add(id_)

    def remove(self, id_):
        with self._lock:
            self._ids.discard(id_)

    def clear(self):
        with self._lock:
            self._ids.clear()

    def close(self):
        self._end.set()
        self._thread.join(timeout=10)


def _best(rows, plan):
    """The best finite value of the metric among rows; 0 where nothing is ranked."""
    if plan.metric is None:
        return 0.0
    values = [
        row[plan.metric]
        for row in rows
        if row["status"] == "ok" and row.get(plan.metric) is not None
    ]
    if not values:
        return None
    return min(values) if plan.goal == "min" else max(values)


def _optuna():
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "workers need Optuna, which is not installed: pip install 'sdegen[sweep]'. "
            "Without it a static grid runs anywhere: --shard 0/4 to --shard 3/4."
        ) from error
    return optuna


def _sampler(optuna, name):
    if name == "tpe":
        # Points under way count as bad ones: batches do not crowd one place.
        return optuna.samplers.TPESampler(constant_liar=True)
    return optuna.samplers.RandomSampler()


def _storage(url: str, heartbeat: int, grace: int):
    """The storage; workers that start at once may all try to make its tables."""
    optuna = _optuna()
    callback = optuna.storages.RetryHeartbeatStaleTrialCallback(
        inherit_intermediate_values=True
    )
    for attempt in itertools.count():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.storages.RDBStorage(
                    url,
                    heartbeat_interval=heartbeat,
                    grace_period=grace,
                    heartbeat_stale_trial_callback=callback,
                )
        except ImportError as error:
            raise ImportError(
                f"the storage {_hidden(url)} needs a driver that is not installed "
                f"({error}): pip install 'sdegen[postgres]', for PostgreSQL."
            ) from error
        except Exception as error:
            if attempt < 5 and "already exists" in str(error):
                time.sleep(random.uniform(0.2, 1.0))
                continue
            raise ValueError(
                f"the storage {_hidden(url)} cannot be used: "
                f"{str(error).splitlines()[0]:.200}. Expected an Optuna URL such as "
                "sqlite:///sweep.db or postgresql+psycopg://user@host/database."
            ) from error


def _hidden(url: str) -> str:
    """A URL without its password."""
    scheme, at, rest = url.rpartition("@")
    return f"{scheme.split('://')[0]}://...@{rest}" if at else url

