"""Finished trials as one tidy table: a row for each, and statistics over the seeds."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runs.recorder import describe, table
from .folder import write
from .space import SEED

_NOT_AXES = ("trial", SEED, "status", "step")


@dataclasses.dataclass(frozen=True)
class Results:
    """Rows of finished trials.

    **Arguments:**

    - `rows`: dicts with "trial", the axes, "seed", "status" ("ok", "non-finite",
      "stopped" at a rung, "failed") and the metrics.
    - `axes`: the names of the hyperparameters.
    - `metric`: the one that trials are ranked by, or None.
    - `goal`: "min" or "max".
    """

    rows: Sequence[dict[str, Any]]
    axes: Sequence[str]
    metric: str | None
    goal: str = "min"

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, the one of the ranking first."""
        names = dict.fromkeys(
            name
            for row in self.rows
            for name in row
            if name not in _NOT_AXES and name not in self.axes
        )
        first = [self.metric] if self.metric in names else []
        return first + [name for name in names if name != self.metric]

    def summary(self) -> list[dict[str, Any]]:
        """A row for each point of the space, best first: statistics over its seeds.

        Each metric has its mean and standard error (of the finite trials that ran to
        the end), `seeds` is their number and `lost` that of the others. With one seed
        the error is NaN.
        """
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            point = {name: row.get(name) for name in self.axes}
            groups.setdefault(json.dumps(describe(point)), []).append(row)
        rows = []
        for group in groups.values():
            fine = [row for row in group if row["status"] == "ok"]
            row = {name: group[0].get(name) for name in self.axes}
            for name in self.metrics:
                values = [r[name] for r in fine if r.get(name) is not None]
                row[name] = float(np.mean(values)) if values else math.nan
                row[f"{name} se"] = standard_error(values)
            row |= {"seeds": len(fine), "lost": len(group) - len(fine)}
            rows.append(row)
        if self.metric is None:
            return rows
        return sorted(rows, key=lambda row: _rank(row.get(self.metric), self.goal))

    def best(self, n: int = 1) -> list[dict[str, Any]]:
        """The first `n` rows of the summary."""
        return self.summary()[:n]

    def table(self, n: int | None = None) -> str:
        """The first `n` points, best first, with mean +- standard error, as text."""
        rows = []
        for row in self.summary()[:n]:
            line = {name: _text(row.get(name)) for name in self.axes}
            for name in self.metrics:
                line[name] = _with_error(row[name], row[f"{name} se"])
            lost = f" ({row['lost']} lost)" if row["lost"] else ""
            rows.append(line | {"seeds": f"{row['seeds']}{lost}"})
        return table(rows) if rows else ""

    def line(self) -> str:
        """The best point in a line."""
        row = self.summary()[0]
        axes = ", ".join(f"{name}={_text(row.get(name))}" for name in self.axes)
        name = self.metrics[0] if self.metrics else None
        if name is None:
            return axes
        return f"{name} {_with_error(row[name], row[f'{name} se'])} at {axes}"

    def save(self, directory: str | Path) -> None:
        """Write results.csv, results.jsonl (a row per trial) and summary.csv."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(describe(row)) + "\n" for row in self.rows)
        write(directory / "results.jsonl", "".join(lines))
        write(directory / "results.csv", _csv(self.rows))
        write(directory / "summary.csv", _csv(self.summary()))


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _text(value):
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _with_error(mean, error):
    if not math.isfinite(mean):
        return "-"
    return f"{mean:.4g}" + (f" +- {error:.1g}" if math.isfinite(error) else "")


def _rank(value, goal):
    if value is None or not math.isfinite(value):
        return math.inf
    return value if goal == "min" else -value


def _csv(rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
