"""The slots of a sweep in a storage, which any number of workers claim.

A slot is a job of the grid or, with a sampler, a point: an Optuna trial that waits,
runs, and is finished. A trial whose heartbeats stop fails, and a copy of it waits.
"""

import abc
import dataclasses
import math
import random
import time
import warnings
from typing import Any

from .._compat import requeue, trial_id
from .storage import RETRIES, Life, fail_stale, load_optuna, make_sampler, open_storage


class Slots(abc.ABC):
    """The slots of a sweep in an Optuna storage, used by process 0 of a worker.

    **Arguments:**
    - `folder`: that of the sweep.
    - `plan`, `url`, `sampler`, `batch`, `heartbeat`, `grace`: see `work`.
    """

    def __init__(self, plan, url, folder, sampler, batch, heartbeat, grace):
        self.plan, self.folder, self.batch, self.grace = plan, folder, batch, grace
        optuna = load_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.states, self.optuna = optuna.trial.TrialState, optuna
        self.mine: list[int] = []
        self.storage = open_storage(url, heartbeat, grace)
        self.study = optuna.create_study(
            storage=self.storage,
            study_name=str(folder.place.name),
            direction="minimize" if plan.goal == "min" else "maximize",
            sampler=make_sampler(optuna, sampler),
            load_if_exists=True,
        )
        self.id = self.storage.get_study_id_from_name(self.study.study_name)
        held = self.study.user_attrs.get("sweep")
        if held is None:
            self.study.set_user_attr("sweep", folder.identity)
        elif held != folder.identity:
            raise ValueError(
                f"the storage holds another sweep called {self.study.study_name!r}. "
                "Choose a folder of another name, or another storage."
            )
        there = {trial.user_attrs.get("slot") for trial in self._trials()}
        for slot in range(self.slots()):
            if slot not in there:
                waiting = {"state": self.states.WAITING, "user_attrs": {"slot": slot}}
                self.study.add_trial(optuna.create_trial(**waiting))
        self.life = Life(self.storage, heartbeat, self.mine)

    @abc.abstractmethod
    def slots(self) -> int:
        """The number of slots."""

    @abc.abstractmethod
    def _claim(self, live: dict[int, Any]) -> dict[str, Any] | None:
        """Claim a job among the `live` trials, by slot; None if none is free."""

    @abc.abstractmethod
    def report(self, rows: list[dict[str, Any]]) -> None:
        """Finish the job, whose rows these are."""

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
        logged = False
        while True:
            fail_stale(self.study)
            live = self._live()
            if task := self._claim(live):
                return task
            left = [t for t in live.values() if not t.state.is_finished()]
            if not left:
                self._report_lost(live)
                return None
            if not logged:
                self.folder.log(
                    f"waits: {len(left)} jobs are with other workers, and become free "
                    f"if one is silent for {self.grace} s"
                )
                logged = True
            time.sleep(random.uniform(0.5, 1.0) * min(self.grace / 3, 5.0))

    def _report_lost(self, live):
        lost = sorted({t.user_attrs.get("slot") for t in self._trials()} - live.keys())
        if lost:
            text = f"{len(lost)} jobs took {RETRIES} workers with them: {lost[:10]}"
            self.folder.log(f"gives up: {text}")
            warnings.warn(f"{text}. They may need more memory.", stacklevel=3)

    def _take(self, trial) -> bool:
        """Claim the trial if it waits; False if another worker was faster."""
        if trial.state != self.states.WAITING:
            return False
        # The heartbeat first: a worker killed between the two would keep the claim.
        self.storage.record_heartbeat(trial_id(trial))
        got = self._set(trial_id(trial), self.states.RUNNING)
        if got:
            self.mine.append(trial_id(trial))
        return got

    def _set(self, id_: int, state, values=None) -> bool:
        """Change a trial's state; False if another worker has it, or has requeued it.

        That worker finds the rows in the folder.
        """
        try:
            return self.storage.set_trial_state_values(id_, state, values)
        except self.optuna.exceptions.UpdateFinishedTrialError:
            return False

    def _finish(self, id_: int, value: float) -> None:
        """Finish a trial with its value, which need not be finite."""
        if math.isfinite(value):
            self._set(id_, self.states.COMPLETE, [value])
        else:
            self._set(id_, self.states.PRUNED)

    def _give_back(self, id_: int) -> None:
        """Let another worker have a trial."""
        held = self.storage.get_trial(id_)
        self.mine.remove(id_)
        if not held.state.is_finished():
            self._set(id_, self.states.FAIL)
            requeue(self.study, self.storage, held)

    def failed(self, error: Exception) -> None:
        """Mark the current job as failed by `error`; no worker runs it again."""
        for id_ in self.mine:
            self.storage.set_trial_user_attr(id_, "error", str(error)[:500])
            self._set(id_, self.states.FAIL)
        self.mine.clear()

    def close(self) -> None:
        """Return claimed slots to the other workers, and end."""
        for id_ in list(self.mine):
            self._give_back(id_)
        self.life.close()
        self.storage.remove_session()


class Grid(Slots):
    """A slot is a job of the grid, whose points are known."""

    def slots(self) -> int:
        """The number of jobs."""
        self.jobs = self.plan.jobs()
        return len(self.jobs)

    def _claim(self, live):
        for slot, trial in sorted(live.items()):
            if self._take(trial):
                return task(f"{slot:04d}", slot, len(self.jobs), self.jobs[slot].points)
        return None

    def report(self, rows):
        """Finish the job; its value is that of its best trial; 0 without a metric."""
        metric, fine = self.plan.metric, [row for row in rows if row["status"] == "ok"]
        values = [row[metric] for row in fine if row.get(metric) is not None]
        best = min if self.plan.goal == "min" else max
        value = 0.0 if metric is None else best(values, default=math.nan)
        for id_ in self.mine:
            self._finish(id_, value)
        self.mine.clear()


def task(name: str, number: int, total: int | None, points: Any) -> dict[str, Any]:
    """A job as plain JSON, for all processes of a worker."""
    points = [dataclasses.asdict(point) for point in points]
    return {"name": name, "number": number, "total": total, "points": points}
