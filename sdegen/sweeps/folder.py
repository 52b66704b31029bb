"""A sweep on disk: what it is, its finished jobs, and a ledger.

    sweep.json              what is swept; a folder of another sweep is refused
    jobs/NAME/results.jsonl a finished job: a row for each trial, written whole
    jobs/NAME/checkpoints/  a job under way
    ledger.txt              what each worker did, and when
    results.csv, results.jsonl, summary.csv, sweep.png     all finished trials

Any number of processes on any number of hosts may share a folder; a job is worked on
by one at a time.
"""

import datetime
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ..runs.recorder import describe, differing


class Folder:
    """The folder of the sweep that `identity` describes; made if it is not there."""

    def __init__(self, place: str | Path, identity: Any):
        self.place = Path(place).absolute()
        self.identity = json.loads(json.dumps(describe(identity)))
        held, file = None, self.place / "sweep.json"
        if file.exists():
            held = json.loads(file.read_text())
        elif self.place.is_dir() and any(self.place.iterdir()):
            raise ValueError(
                f"{self.place} is not empty and holds no sweep. Choose another folder."
            )
        if held is not None and (text := differing(held, self.identity)):
            raise ValueError(
                f"{self.place} holds another sweep: {text}. Choose another folder, or "
                "give the same sweep to go on with it."
            )
        if held is None and jax.process_index() == 0:
            self.place.mkdir(parents=True, exist_ok=True)
            write(file, json.dumps(self.identity, indent=2) + "\n")

    def job(self, name: str) -> Path:
        """Where the job called `name` is worked on."""
        return self.place / "jobs" / name

    def finished(self, name: str) -> list[dict[str, Any]] | None:
        """The rows of a finished job; None while it is not."""
        file = self.job(name) / "results.jsonl"
        return read_lines(file) if file.exists() else None

    def finish(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write the rows of a job, whole."""
        if jax.process_index() != 0:
            return
        self.job(name).mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(describe(row)) + "\n" for row in rows)
        write(self.job(name) / "results.jsonl", text)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of all finished jobs, by the number of the trial."""
        return self.peek(self.place)

    @staticmethod
    def peek(place: str | Path) -> list[dict[str, Any]]:
        """The rows of all finished jobs of the folder at `place`."""
        files = (Path(place) / "jobs").glob("*/results.jsonl")
        rows = [row for file in files for row in read_lines(file)]
        return sorted(rows, key=lambda row: row["trial"])

    def log(self, text: str) -> None:
        """A line in the ledger: time, host and process, what happened."""
        if jax.process_index() != 0:
            return
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        line = f"{now}  {socket.gethostname()}:{os.getpid()}  {text}\n"
        # One write of a short line is appended whole, also beside other writers.
        with open(self.place / "ledger.txt", "ab", buffering=0) as file:
            file.write(line.encode())


def write(place: Path, text: str) -> None:
    """`text` as the whole file, or the file as it was; many may write the same."""
    beside = place.with_name(f"{place.name}.{socket.gethostname()}.{os.getpid()}.new")
    beside.write_text(text)
    beside.replace(place)


def read_lines(place: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in place.read_text().splitlines()]
