"""Slots whose points a sampler chooses, several at once to one program.

The first slot of such a batch leads: its trial in the storage lists the slots of the
batch. A worker that claims it after its worker was lost claims the others, too.
"""

import itertools
import math
import time
from collections.abc import Mapping

from .._compat import trial_id
from .queue import Slots, task
from .space import SEED, Between, Static, as_point
from .storage import fail_stale


class Search(Slots):
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
        # A batch whose worker was lost continues as it was.
        led = {s: t for s, t in sorted(live.items()) if "batch" in t.user_attrs}
        for slot, trial in led.items():
            if self._take(trial):
                self._gather(trial.user_attrs["batch"], slot)
                return self._begin(trial.user_attrs["batch"])
        unfinished = (t for t in led.values() if not t.state.is_finished())
        reserved = set().union(*(t.user_attrs["batch"] for t in unfinished))
        taken, groups = [], {}
        # Those whose point is chosen first.
        for slot, trial in sorted(live.items(), key=lambda s: (not s[1].params, s[0])):
            room = len(taken) < self.batch and slot not in reserved
            if room and self._take(trial):
                taken.append((slot, trial))
        for slot, trial in taken:
            static = self._choose(trial_id(trial))
            groups.setdefault(str(sorted(static.items())), []).append((slot, trial))
        if not groups:
            return None
        first, *others = sorted(groups.values(), key=len, reverse=True)
        # Other programs are for the next worker: their points are chosen already.
        for _, trial in itertools.chain(*others):
            self._give_back(trial_id(trial))
        members = [slot for slot, _ in first]
        self.storage.set_trial_user_attr(trial_id(first[0][1]), "batch", members)
        return self._begin(members)

    def _gather(self, members, lead):
        """Claim the rest of a batch, whose heartbeats end when its leader's did."""
        while True:
            fail_stale(self.study)
            live = self._live()
            rest = [live[slot] for slot in members if slot != lead]
            for trial in rest:
                self._take(trial)
            if all(t.state.is_finished() or trial_id(t) in self.mine for t in rest):
                return
            time.sleep(min(self.grace / 10, 1.0))

    def _choose(self, id_: int) -> dict[str, str]:
        """Let the sampler choose the point of a slot, if it has not yet."""
        # Loaded anew: a study keeps the trials that it once saw.
        study = self.optuna.load_study(
            study_name=self.study.study_name,
            storage=self.storage,
            sampler=self.study.sampler,
        )
        study.get_trials(deepcopy=False)  # its cache must know them
        trial, static = self.optuna.trial.Trial(study, id_), {}
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
        self.ids = {slot: trial_id(live[slot]) for slot in members}
        self.slot, points, seeds = {}, [], part.get(SEED, [0])
        for slot, (k, seed) in itertools.product(members, enumerate(seeds)):
            number = slot * len(seeds) + k
            self.slot[number] = slot
            points.append(as_point(part, number, live[slot].params, seed))
        return task(f"batch-{members[0]:04d}", members[0], None, points)

    def _means(self, values: Mapping[int, float]) -> dict[int, float]:
        """The mean over the seeds of every slot; NaN if one of them is not finite."""
        several: dict[int, list[float]] = {}
        for number, value in values.items():
            several.setdefault(self.slot[number], []).append(value)
        return {slot: sum(all_) / len(all_) for slot, all_ in several.items()}

    def prune(self, step: int, values: dict[int, float]) -> list[int]:
        """The trials to stop at a rung, by what all workers have reported there.

        Asynchronous successive halving: no worker waits for others (Li et al. 2020, "A
        system for massively parallel hyperparameter tuning").

        **Arguments:**
        - `step`: that of the rung.
        - `values`: the metric of each trial by its number.
        """
        means = self._means(values)
        for slot, value in means.items():
            if math.isfinite(value):
                self.storage.set_trial_intermediate_value(self.ids[slot], step, value)
        everyone = {
            slot: trial.intermediate_values[step]
            for slot, trial in self._live().items()
            if step in trial.intermediate_values
        }
        out = self.plan.halving.stop(everyone | means, self.plan.goal)
        return [number for number in values if self.slot[number] in out]

    def report(self, rows):
        """Finish every point; its value is the mean over its seeds."""
        values = {}
        for row in rows:
            value = row.get(self.plan.metric) if row["status"] == "ok" else None
            values[row["trial"]] = math.nan if value is None else value
        for slot, value in self._means(values).items():
            self._finish(self.ids[slot], value)
        self.mine.clear()
