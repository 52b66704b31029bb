"""What a run leaves behind: config.json, rows.jsonl, timing.jsonl, by process 0."""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..typing import is_key


class Recorder:
    """Writes rows (JSON lines, one flush per row) and a config into a directory.

    `rows.jsonl` holds what is a function of the config alone, so that two runs can be
    compared line by line; rates and times, which depend on the machine, go to
    `timing.jsonl`. Only process 0 writes; calls of the others do nothing.

    **Arguments:**
    - `directory`: of the run.
    - `config`: what the run is, a dataclass or anything that `describe` takes.
    - `resume`: go on with the rows that are there (`fit` takes back those after the
      step it starts from). Default False: start anew.
    - `free`: fields in which the config may differ from that of the resumed run.
    - `writers`: get the same rows, see `sdegen.runs.writers`.

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
        self.directory = Path(directory)
        self._rows, self._timing, self._resume = None, None, resume
        self._writers = writers if jax.process_index() == 0 else ()
        plain = None if config is None else json.loads(json.dumps(describe(config)))
        place = self.directory / "config.json"
        if resume and plain is not None and place.exists():
            held = json.loads(place.read_text())
            hide = dict.fromkeys(free)
            difference = differing(held | hide, plain | hide)
            if difference:
                raise ValueError(
                    f"{self.directory} belongs to another config: {difference}. Give "
                    "the same settings to go on with it, or another directory."
                )
        if jax.process_index() != 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        if plain is not None:
            _write(place, json.dumps(plain, indent=2) + "\n")
        self._open("a" if resume else "w")

    def row(self, **values: Any) -> None:
        """One line of JSON; numbers that are not finite become null."""
        if self._rows is not None:
            self._rows.write(json.dumps(describe(values)) + "\n")
            self._to_writers(values)

    def timing(self, **values: Any) -> None:
        """One line about speed, in a file of its own."""
        if self._timing is not None:
            self._timing.write(json.dumps(describe(values)) + "\n")
            self._to_writers(values)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture, (h, w, 3) uint8, for the writers."""
        for writer in self._writers:
            writer.image(step, name, image)

    def _open(self, mode):
        if mode == "a":
            for name in ("rows.jsonl", "timing.jsonl"):
                _drop_half_a_line(self.directory / name)
        self._rows = open(self.directory / "rows.jsonl", mode, buffering=1)
        self._timing = open(self.directory / "timing.jsonl", mode, buffering=1)

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
        place, kept = self.directory / "rows.jsonl", []
        for line in place.read_text().splitlines():
            try:
                at = json.loads(line).get("step")
            except ValueError:  # cut short by a crash of the machine
                break
            if at is not None and at <= step:
                kept.append(line + "\n")
        _write(place, "".join(kept))
        self._rows = open(place, "a", buffering=1)

    def close(self) -> None:
        """Close the files and the writers."""
        for file in (self._rows, self._timing):
            if file is not None:
                file.close()
        for writer in self._writers:
            writer.close()
        self._rows, self._timing, self._writers = None, None, ()

    def _to_writers(self, values):
        step = values.get("step")
        plain = describe(values).items()
        numbers = {k: v for k, v in plain if isinstance(v, float | int) and k != "step"}
        if step is not None:
            for writer in self._writers:
                writer.scalars(int(step), numbers)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def _write(place, text):
    """`text` as the whole file, or the file as it was."""
    beside = place.with_name(place.name + ".new")
    beside.write_text(text)
    beside.replace(place)


def _drop_half_a_line(place):
    """Remove a last line that a crash of the machine cut short."""
    text = place.read_bytes() if place.exists() else b""
    if text and not text.endswith(b"\n"):
        _write(place, text[: text.rfind(b"\n") + 1].decode())


def differing(old: Any, new: Any, name: str = "") -> str:
    """Where two values of plain JSON differ first, in words; "" if they do not."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            inner = f"{name}.{key}" if name else str(key)
            if text := differing(old.get(key), new.get(key), inner):
                return text
        return ""
    return "" if old == new else f"its {name} is {old!r:.80}, this one's {new!r:.80}"


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


def table(rows: Sequence[dict], *, digits: int = 3) -> str:
    """Rows as aligned plain text, numbers to the right.

    **Arguments:**
    - `rows`: dictionaries with the same keys, at least one.
    - `digits`: after the point, or significant ones below 0.01; default 3.
    """

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


def progress_bar(steps: int, progress: bool = True, start: int = 0):
    """A tqdm bar from `start` to `steps`, shown on process 0 if `progress`."""
    from tqdm import tqdm

    hidden = not progress or jax.process_index() != 0
    options = {"total": steps, "initial": start, "unit": "step", "dynamic_ncols": True}
    return tqdm(disable=hidden, **options)
