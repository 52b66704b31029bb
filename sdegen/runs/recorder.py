"""What a run leaves behind: config.json, rows.jsonl, timing.jsonl, by process 0."""

import dataclasses
import functools
import json
import math
import numbers
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..typing import is_key


class Recorder:
    """Writes rows, as JSON lines, and a config into a directory; only process 0 does.

    `rows.jsonl` holds what is a function of the config alone, so that two runs can be
    compared line by line; rates, which depend on the machine, go to `timing.jsonl`.

    **Arguments:**
    - `directory`: of the run.
    - `config`: what the run is, a dataclass or anything that `describe` takes.
    - `resume`: go on with the rows that are there (`fit` takes back those after the
      step it starts from). Default False: start anew.
    - `free`: fields in which the config may differ from that of the resumed run;
      "out" and "mesh" by default.
    - `writers`: get the same rows, see `sdegen.runs.writers`; none by default.

    **Raises:** ValueError if the directory to resume has another config.
    """

    def __init__(
        self,
        directory: str | Path,
        config: Any = None,
        *,
        resume: bool = False,
        free: Sequence[str] = ("out", "mesh"),
        writers: Sequence[Any] = (),
    ):
        self.directory = Path(directory).expanduser()
        self._rows, self._timing, self._resume = None, None, resume
        self._writers = writers if jax.process_index() == 0 else ()
        plain = None if config is None else json.loads(json.dumps(describe(config)))
        place = self.directory / "config.json"
        if resume and plain is not None and place.exists():
            held, hide = json.loads(place.read_text()), dict.fromkeys(free)
            refuse_other(self.directory, "config", held | hide, plain | hide)
        if jax.process_index() != 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        if plain is not None:
            write_whole(place, json.dumps(plain, indent=2) + "\n")
        files = [self.directory / name for name in ("rows.jsonl", "timing.jsonl")]
        for file in files:
            write_whole(file, json_lines(read_rows(file)) if resume else "")
        self._rows, self._timing = (open(file, "a", buffering=1) for file in files)

    def row(self, **values: Any) -> None:
        """One line of JSON; numbers that are not finite become null."""
        self._write(self._rows, values)

    def timing(self, **values: Any) -> None:
        """One line about speed, in a file of its own."""
        self._write(self._timing, values)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture, (h, w, 3) uint8, for the writers."""
        for writer in self._writers:
            writer.image(step, name, image)

    def rewind(self, step: int) -> None:
        """Remove the rows after `step`, and those without a step."""
        if self._rows is None:
            return
        if step and not self._resume:
            raise ValueError(
                f"the run in {self.directory} goes on from step {step}, but its rows "
                "were begun anew: make the recorder with resume=True."
            )
        self._rows.close()
        place = self.directory / "rows.jsonl"
        kept = [row for row in read_rows(place) if row.get("step", math.inf) <= step]
        write_whole(place, json_lines(kept))
        self._rows = open(place, "a", buffering=1)

    def close(self) -> None:
        """Close the files and the writers."""
        for file in (self._rows, self._timing):
            if file is not None:
                file.close()
        for writer in self._writers:
            writer.close()
        self._rows, self._timing, self._writers = None, None, ()

    def _write(self, file, values):
        if file is None:
            return
        file.write(json_lines([values]))
        step, plain = values.get("step"), describe(values).items()
        scalars = {k: v for k, v in plain if isinstance(v, float | int) and k != "step"}
        for writer in self._writers if step is not None else ():
            writer.scalars(int(step), scalars)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def write_whole(place: Path, text: str) -> None:
    """`text` as the whole file, or the file as it was; many may write the same."""
    beside = place.with_name(f"{place.name}.{socket.gethostname()}.{os.getpid()}.new")
    beside.write_text(text)
    beside.replace(place)


def json_lines(rows: Iterable[dict[str, Any]]) -> str:
    """`rows` as JSON, one to a line."""
    return "".join(json.dumps(describe(row)) + "\n" for row in rows)


def read_rows(place: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, without those that a crash cut short."""
    rows = []
    for line in place.read_text().splitlines() if place.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def differing(old: Any, new: Any, name: str = "") -> str:
    """Where two values of plain JSON differ first, in words; "" if they do not."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            inner = f"{name}.{key}" if name else str(key)
            if text := differing(old.get(key), new.get(key), inner):
                return text
        return ""
    return "" if old == new else f"its {name} is {old!r:.80}, this one's {new!r:.80}"


def refuse_other(place: Path, what: str, held: Any, own: Any) -> None:
    """Refuse a directory that holds another `what`, plain JSON, than this one's."""
    if difference := differing(held, own):
        raise ValueError(
            f"{place} holds another {what}: {difference}. Go on with the same "
            "settings, or choose another directory."
        )


def describe(value: Any) -> Any:
    """`value` as plain JSON: dataclasses become dicts with their class's name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__} | describe(fields)
    if isinstance(value, dict):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [describe(v) for v in value]
    if isinstance(value, set | frozenset):  # whose order differs between processes
        return sorted((describe(v) for v in value), key=json.dumps)
    if isinstance(value, jax.Array) and is_key(value):
        return describe(jax.random.key_data(value))
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return describe(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, functools.partial):
        return describe([value.func, value.args, value.keywords])
    name = getattr(value, "__name__", None) or str(value)
    return type(value).__name__ if " at 0x" in name else name  # no address


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters, or its class."""
    return f"{(str(error).strip().splitlines() or [type(error).__name__])[0]:.200}"


def is_number(value: Any) -> bool:
    """Whether `value` is a real number, of Python or NumPy; booleans are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def table(rows: Sequence[dict], *, digits: int = 3) -> str:
    """Rows as aligned plain text, numbers to the right.

    **Arguments:**
    - `rows`: dictionaries, at least one; "-" stands for a key that one lacks.
    - `digits`: after the point, or significant ones below 0.01; default 3.
    """

    def text(value):
        if not isinstance(value, float):
            return str(value)
        return f"{value:.{digits}{'g' if abs(value) < 1e-2 else 'f'}}"

    columns = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name, "-") for row in rows]
        pad = str.ljust if isinstance(values[0], str) else str.rjust
        cells = [name, *map(text, values)]
        width = max(map(len, cells))
        columns.append([pad(cell, width) for cell in cells])
    lines = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def progress_bar(steps: int, progress: bool = True, start: int = 0):
    """A tqdm bar from `start` to `steps`, shown on process 0 if `progress`."""
    from tqdm import tqdm

    hidden = not progress or jax.process_index() != 0
    options = {"total": steps, "initial": start, "unit": "step", "dynamic_ncols": True}
    return tqdm(disable=hidden, **options)
