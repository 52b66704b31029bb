"""Runs compared, in one table and one picture.

    sdegen report RUN RUN ... [--out report.png]

A run is a directory with config.json and rows.jsonl. The table has what differs between
the configs, the loss over the last tenth of the rows, the rate, and the figures of the
first row after training, one without a step; the picture has the loss curves.
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
from .recorder import table

_SELF = ("out", "class")


def read(directory: str | Path) -> dict[str, Any]:
    """A run: its name, flat config, rows, final rows (without a step) and timing."""
    directory = Path(directory)
    place = directory / "rows.jsonl"
    if not place.exists():
        raise FileNotFoundError(
            f"no run in {directory}: expected {place.name} (and config.json) there."
        )
    config = directory / "config.json"
    rows = _lines(place)
    return {
        "name": directory.name or str(directory),
        "config": _flat(json.loads(config.read_text())) if config.exists() else {},
        "rows": [row for row in rows if "step" in row and "loss" in row],
        "final": [row for row in rows if "step" not in row],
        "timing": _lines(directory / "timing.jsonl"),
    }


def _lines(place):
    if not place.exists():
        return []
    rows = []
    for line in place.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut short by a crash of the machine
            continue
    return rows


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
        rates = [t.get("samples_per_second") for t in run["timing"]]
        rates = [rate for rate in rates if rate is not None]
        row["samples/s"] = f"{rates[-1]:,.0f}" if rates else "-"
        for final in run["final"][:1]:
            row |= {k: v for k, v in final.items() if _is_number(v) and k not in row}
        rows.append(row)
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key, "-") for key in columns} for row in rows]


def _is_number(value):
    return isinstance(value, float | int) and not isinstance(value, bool)


def _text(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `sdegen report`; `argv` defaults to the command line."""
    parser = argparse.ArgumentParser(prog="sdegen report", description="Runs compared.")
    parser.add_argument("runs", type=Path, nargs="+", help="directories of runs")
    parser.add_argument(
        "--out", type=Path, default=Path("report.png"), help="picture of the losses"
    )
    arguments = parser.parse_args(argv)
    try:
        runs = [read(directory) for directory in arguments.runs]
        if len({run["name"] for run in runs}) < len(runs):
            for run, directory in zip(runs, arguments.runs, strict=True):
                run["name"] = str(directory)
        print(table(summary(runs)))
        curves = {
            run["name"]: (
                np.array([row["step"] for row in run["rows"]]),
                np.array([row["loss"] for row in run["rows"]], float),
            )
            for run in runs
            if run["rows"]
        }
        if curves:
            window = max(1, max(len(run["rows"]) for run in runs) // 100)
            labels = {"xlabel": "step", "ylabel": "loss"}
            plots.curves(arguments.out, curves, smooth=window, **labels)
            print(f"picture: {arguments.out}")
    except (ValueError, OSError, MissingPackageError) as error:
        sys.exit(f"error: {error}")
