"""A sweep on disk: what it is, its finished jobs, and a ledger.

    sweep.json              what is swept; a folder of another sweep is refused
    jobs/NAME/results.jsonl a finished job: a row for each trial, written whole
    jobs/NAME/checkpoints/  a job under way
    ledger.txt              what each worker did, and when
    results.csv, results.jsonl, summary.csv, sweep.png     all finished trials

Any number of processes and hosts may share it; a job is worked on by one at a time.
"""

import datetime
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ..runs.recorder import describe, json_lines, refuse_other, write_whole


class Folder:
    """The folder of a sweep, made if it is not there.

    **Arguments:**
    - `place`: where it is; another sweep's is refused.
    - `identity`: what the sweep is, as `describe` takes it.
    """

    def __init__(self, place: str | Path, identity: Any):
        self.place = Path(place).expanduser().absolute()
        self.identity = json.loads(json.dumps(describe(identity)))
        file = self.place / "sweep.json"
        # Looked at first: another process may be making the folder at this moment.
        inside = self.place.iterdir() if self.place.is_dir() else ()
        inside = [path for path in inside if not path.name.startswith(file.name)]
        if file.exists():
            held = json.loads(file.read_text())
            refuse_other(self.place, "sweep", held, self.identity)
        elif inside:
            raise ValueError(
                f"{self.place} is not empty and holds no sweep. Choose another folder."
            )
        elif jax.process_index() == 0:
            self.place.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(self.identity, indent=2) + "\n")

    def job(self, name: str) -> Path:
        """Where the job called `name` is worked on."""
        return self.place / "jobs" / name

    def finished(self, name: str) -> list[dict[str, Any]] | None:
        """The rows of a finished job; None while it is not."""
        file = self.job(name) / "results.jsonl"
        return _read(file) if file.exists() else None

    def finish(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write the rows of a job, whole."""
        if jax.process_index() != 0:
            return
        self.job(name).mkdir(parents=True, exist_ok=True)
        write_whole(self.job(name) / "results.jsonl", json_lines(rows))

    def rows(self) -> list[dict[str, Any]]:
        """The rows of all finished jobs, by the number of the trial."""
        return finished_rows(self.place)

    def log(self, text: str) -> None:
        """A line in the ledger: time, host and process, what happened."""
        if jax.process_index() != 0:
            return
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        line = f"{now}  {socket.gethostname()}:{os.getpid()}  {text}\n"
        # One write of a short line is appended whole, also beside other writers.
        with open(self.place / "ledger.txt", "ab", buffering=0) as file:
            file.write(line.encode())


def finished_rows(place: Path) -> list[dict[str, Any]]:
    """The rows of all finished jobs in the folder at `place`."""
    rows = [row for file in place.glob("jobs/*/results.jsonl") for row in _read(file)]
    return sorted(rows, key=lambda row: row["trial"])


def _read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]
