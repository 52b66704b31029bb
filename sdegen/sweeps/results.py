"""Finished trials as one tidy table: a row for each, and statistics over the seeds."""

import collections
import csv
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runs.recorder import describe, json_lines, table, write_whole
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
    - `goal`: "min", the default, or "max".
    """

    rows: Sequence[dict[str, Any]]
    axes: Sequence[str]
    metric: str | None
    goal: str = "min"

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, the one of the ranking first."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        metrics = [name for name in names if name not in (*_NOT_AXES, *self.axes)]
        return sorted(metrics, key=lambda name: name != self.metric)

    def summary(self) -> list[dict[str, Any]]:
        """A row for each point of the space, best first: statistics over its seeds.

        Each metric has its mean and standard error, NaN with one seed, of the `seeds`
        finite trials that ran to the end; `lost` are the others.
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

        def rank(row):
            value = row.get(self.metric, math.nan) * (1 if self.goal == "min" else -1)
            return value if math.isfinite(value) else math.inf

        return sorted(rows, key=rank)

    def best(self, n: int = 1) -> list[dict[str, Any]]:
        """The first `n` rows of the summary, default 1."""
        return self.summary()[:n]

    def table(self, n: int | None = None) -> str:
        """The best `n` points, default all, with mean +- standard error, as text."""
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
        if not self.metrics:
            return axes
        name = self.metrics[0]
        return f"{name} {_with_error(row[name], row[f'{name} se'])} at {axes}"

    def save(self, directory: str | Path) -> None:
        """Write results.csv, results.jsonl (a row per trial) and summary.csv."""
        directory = Path(directory).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / "results.jsonl", json_lines(self.rows))
        write_whole(directory / "results.csv", _csv(self.rows))
        write_whole(directory / "summary.csv", _csv(self.summary()))


def status_counts(rows: Sequence[dict[str, Any]]) -> str:
    """How many of `rows` have which status, in words."""
    counts = collections.Counter(row["status"] for row in rows)
    return ", ".join(f"{n} {kind}" for kind, n in counts.items())


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


def _csv(rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
