"""Runs compared, in one table and one picture.

The table has what differs between the configs, the loss over the last tenth of the
rows, the rate, and the figures of the first row without a step, after training.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._compat import MissingPackageError
from . import plots
from .recorder import is_number, read_rows, table

_SELF = ("out", "class")


def read(directory: str | Path) -> dict[str, Any]:
    """A run: its name, flat config, rows, final rows (without a step) and timing."""
    directory = Path(directory).expanduser()
    place = directory / "rows.jsonl"
    if not place.exists():
        raise FileNotFoundError(
            f"no run in {directory}: expected {place.name} (and config.json) there."
        )
    config, rows = directory / "config.json", read_rows(place)
    return {
        "name": directory.name or str(directory),
        "config": _flat(json.loads(config.read_text())) if config.exists() else {},
        "rows": [row for row in rows if "step" in row and "loss" in row],
        "final": [row for row in rows if "step" not in row],
        "timing": read_rows(directory / "timing.jsonl"),
    }


def _flat(value, name=""):
    if not isinstance(value, dict):
        return {name: value}
    flat = {}
    for key, inner in value.items():
        if key == "class" and name:
            flat[name] = inner
        elif key not in _SELF:
            flat |= _flat(inner, f"{name}.{key}" if name else key)
    return flat


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each of the `runs` that `read` gives: where configs differ, results."""
    keys = dict.fromkeys(key for run in runs for key in run["config"])
    apart = [
        key
        for key in keys
        if all(key in run["config"] for run in runs)
        and len({json.dumps(run["config"][key]) for run in runs}) > 1
    ]
    rows = []
    for run in runs:
        row = {"run": run["name"]}
        row |= {key: _text(run["config"][key]) for key in apart}
        losses = [r["loss"] for r in run["rows"] if r["loss"] is not None]
        tail = losses[-max(1, len(losses) // 10) :]
        row["step"] = run["rows"][-1]["step"] if run["rows"] else 0
        row["loss"] = float(np.mean(tail)) if tail else "-"
        looks = [r["validation_loss"] for r in run["rows"] if "validation_loss" in r]
        if looks := [value for value in looks if value is not None]:
            row |= {"held out": looks[-1], "least held out": min(looks)}
        rates = [rate for t in run["timing"] if (rate := t.get("samples_per_second"))]
        row["samples/s"] = f"{rates[-1]:,.0f}" if rates else "-"
        for final in run["final"][:1]:
            row |= {k: v for k, v in final.items() if is_number(v) and k not in row}
        rows.append(row)
    return rows


def _text(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """The command line, `argv` or the process's; `prog` is its name in messages."""
    parser = argparse.ArgumentParser(prog=prog, description="Runs compared.")
    parser.add_argument("runs", type=Path, nargs="+", help="directories of runs")
    picture = {"type": Path, "default": "report.png", "help": "picture of the losses"}
    parser.add_argument("--out", **picture)
    arguments = parser.parse_args(argv)
    try:
        runs = [read(directory) for directory in arguments.runs]
        if len({run["name"] for run in runs}) < len(runs):
            for run, directory in zip(runs, arguments.runs, strict=True):
                run["name"] = str(directory)
        print(table(summary(runs)))
        curves = {}
        for run in (run for run in runs if run["rows"]):
            losses = np.array([row["loss"] for row in run["rows"]], float)
            curves[run["name"]] = [row["step"] for row in run["rows"]], losses
            if looks := [row for row in run["rows"] if "validation_loss" in row]:
                values = np.array([row["validation_loss"] for row in looks], float)
                at = [row["step"] for row in looks]
                curves[f"{run['name']}, held out"] = at, values
        if curves:
            window = max(1, max(len(x) for x, _ in curves.values()) // 100)
            labels = {"xlabel": "step", "ylabel": "loss"}
            plots.curves(arguments.out, curves, smooth=window, **labels)
            print(f"picture: {arguments.out}")
    except (ValueError, OSError, MissingPackageError) as error:
        sys.exit(f"error: {error}")
