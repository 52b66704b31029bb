"""Successive halving: at every rung the worse trials stop. Jamieson & Talwalkar 2016.

The rungs are after total / eta^k steps: each costs as much as the one before.
"""

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Halving:
    """Keep the best 1 / `eta` of the trials, default 2, at each of 3 `rungs`."""

    eta: int = 2
    rungs: int = 3

    def __post_init__(self):
        if self.eta < 2 or self.rungs < 1:
            raise ValueError(f"halving needs eta >= 2 and rungs >= 1, got {self}.")

    def steps(self, total: int, multiple: int = 1) -> list[int]:
        """The steps of the rungs below `total`, rounded up to a `multiple`."""
        raw = (total / self.eta**k for k in range(1, self.rungs + 1))
        up = {math.ceil(step / multiple) * multiple for step in raw}
        return sorted(step for step in up if step < total)

    def stop(self, values: Mapping[int, float], goal: str) -> set[int]:
        """The trials to stop at this rung; non-finite ones always stop.

        **Arguments:**
        - `values`: the metric of each trial by its number.
        - `goal`: "min" or "max".
        """
        bad = {n for n, value in values.items() if not math.isfinite(value)}
        sign = 1 if goal == "min" else -1
        ranked = sorted(values.keys() - bad, key=lambda n: (sign * values[n], n))
        return bad | set(ranked[math.ceil(len(values) / self.eta) :])
