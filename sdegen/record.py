"""What a run leaves behind: config.json and rows.jsonl, written by process 0."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np


class Recorder:
    """Writes rows (JSON lines, one flush per row) and a config into a directory.

    Only process 0 writes; the others may call everything and nothing happens.
    """

    def __init__(self, directory: str | Path, config: Any = None):
        self.directory = Path(directory)
        self._file = None
        if jax.process_index() != 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        if config is not None:
            text = json.dumps(describe(config), indent=2) + "\n"
            (self.directory / "config.json").write_text(text)
        self._file = open(self.directory / "rows.jsonl", "w", buffering=1)

    def row(self, **values: Any) -> None:
        """One line of JSON; numbers that are not finite become null."""
        if self._file is not None:
            self._file.write(json.dumps(describe(values)) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def describe(value: Any) -> Any:
    """`value` as plain JSON: dataclasses become dicts with their class's name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__} | describe(fields)
    if isinstance(value, dict):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [describe(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return describe(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return getattr(value, "__name__", None) or str(value)


def table(rows: Sequence[dict], *, digits: int = 3) -> str:
    """Rows of the same keys as aligned plain text; numbers to the right."""

    def text(value):
        if isinstance(value, float):
            return f"{value:.{digits}g}" if abs(value) < 1e-2 else f"{value:.{digits}f}"
        return str(value)

    header = list(rows[0])
    cells = [header] + [[text(row[k]) for k in header] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    right = [not isinstance(rows[0][k], str) for k in header]
    lines = [
        "  ".join(
            c.rjust(w) if r else c.ljust(w)
            for c, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def progress_bar(steps: int, progress: bool = True):
    """A tqdm bar of `steps`, on process 0 only."""
    from tqdm import tqdm

    hidden = not progress or jax.process_index() != 0
    return tqdm(total=steps, unit="step", disable=hidden, dynamic_ncols=True)
