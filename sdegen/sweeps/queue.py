"""The slots of a sweep in a storage, which any number of workers claim.

A slot is a job of the grid or, with a sampler, a point. Each is an Optuna trial that
waits, runs, and is finished; claiming one is atomic. A trial whose heartbeats stop
fails, and a copy of it waits in its place.
"""

import dataclasses
import random
import time
import warnings
from typing import Any

from .._compat import requeue, trial_id
from .storage import RETRIES, Life, fail_stale, load_optuna, make_sampler, open_storage


class Slots:
    """The slots of a sweep in an Optuna storage, used by process 0 of a worker."""

    def __init__(self, plan, url, folder, sampler, batch, heartbeat, grace):
        self.plan, self.folder, self.batch, self.grace = plan, folder, batch, grace
        optuna = load_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.states = optuna.trial.TrialState
        self.optuna, self.mine, self.task = optuna, [], None
        self.storage = open_storage(url, heartbeat, grace)
        self.study = optuna.create_study(
            storage=self.storage,
            study_name=str(folder.place.name),
            direction="minimize" if plan.goal == "min" else "maximize",
            sampler=make_sampler(optuna, sampler),
            load_if_exists=True,
        )
        self.id = self.storage.get_study_id_from_name(self.study.study_name)
        self._check_identity()
        self._enqueue()
        self.life = Life(self.storage, heartbeat)

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
        for slot in range(self.slots()):  # pyright: ignore[reportAttributeAccessIssue]
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
        logged = False
        while True:
            fail_stale(self.study)
            live = self._live()
            if self._claim(live):  # pyright: ignore[reportAttributeAccessIssue]
                return self.task
            if all(trial.state.is_finished() for trial in live.values()):
                self._report_lost(live)
                return None
            if not logged:
                left = [s for s, t in live.items() if not t.state.is_finished()]
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
            warnings.warn(
                f"{text}. They may need more memory than there is.", stacklevel=3
            )

    def _take(self, trial) -> bool:
        """Claim one waiting trial; False if another worker was faster."""
        errors = self.optuna.exceptions
        # The heartbeat first: a worker killed between the two would keep the claim.
        self.storage.record_heartbeat(trial_id(trial))
        try:
            got = self.storage.set_trial_state_values(
                trial_id(trial), state=self.states.RUNNING
            )
        except errors.UpdateFinishedTrialError:
            got = False
        if got:
            self.mine.append(trial_id(trial))
            self.life.add(trial_id(trial))
        return got

    def _finish(self, id_: int, state, values=None):
        try:
            self.storage.set_trial_state_values(id_, state, values)
        except self.optuna.exceptions.UpdateFinishedTrialError:
            # Another worker has requeued it, and finds the rows in the folder.
            pass

    def _release(self):
        self.life.clear()
        self.mine = []

    def failed(self, error: Exception) -> None:
        """Mark the current job as failed; no worker runs it again."""
        for id_ in self.mine:
            self.storage.set_trial_user_attr(id_, "error", str(error)[:500])
            self._finish(id_, self.states.FAIL)
        self._release()

    def close(self) -> None:
        """Return claimed slots to the other workers, and end."""
        for id_ in self.mine:
            trial = self.storage.get_trial(id_)
            if not trial.state.is_finished():
                self._finish(id_, self.states.FAIL)
                requeue(self.study, self.storage, trial)
        self._release()
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
            if trial.state == self.states.WAITING and self._take(trial):
                self.task = {
                    "name": f"{slot:04d}",
                    "number": slot,
                    "total": len(self.jobs),
                    "points": [dataclasses.asdict(p) for p in self.jobs[slot].points],
                }
                return True
        return False

    def report(self, rows) -> None:
        """Finish the job; its value is that of its best trial."""
        best = _best(rows, self.plan)
        for id_ in self.mine:
            if best is None:
                self._finish(id_, self.states.PRUNED)
            else:
                self._finish(id_, self.states.COMPLETE, [best])
        self._release()


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
