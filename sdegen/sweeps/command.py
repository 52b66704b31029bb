"""The command `sdegen sweep`: in one process, by workers that pull jobs, or in shards.

    sdegen sweep FILE --dry-run
    sdegen sweep FILE
    sdegen sweep FILE --workers 2
    sdegen sweep FILE --storage postgresql+psycopg://me@host/sweeps
    sdegen sweep FILE --shard 0/4
    sdegen sweep FILE --trials 64 --sampler tpe --workers 1

A sweep file is Python that sets `sweep = sdegen.Sweep(trial, space, ...)`; there are
some in experiments/sweeps of the repository. Trials that differ in numbers alone run as
one program, whose trial axis is split over all devices. Everything is kept in --out:
the same command with --resume goes on from there, and any number of hosts may start it
with the same --storage, or with a shard each.

At the end, and with --status at any time: results.csv and results.jsonl, a row for each
trial; summary.csv, means over seeds; sweep.png; ledger.txt, who did what.
"""

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax

from .. import cli
from .._compat import need
from ..mesh import make_mesh
from ..runs.recorder import table
from ..runs.sweep_plot import sweep_plot
from .folder import finished_rows
from .results import Results, status_counts
from .run import Sweep, run
from .space import Between, Static
from .worker import work

tyro = need("tyro", "the command line", extra="cli")


@dataclass(frozen=True)
class Config:
    """The options of `sdegen sweep`."""

    file: Annotated[Path, tyro.conf.Positional]
    """The sweep file."""
    out: Path | None = None
    """Where everything is kept; default runs/sweeps/NAME of the file."""
    dry_run: bool = False
    """List the trials and their programs, and run nothing."""
    status: bool = False
    """Show the results that are there, and run nothing."""
    resume: bool = False
    """Go on with the sweep that is in --out."""
    workers: int = 0
    """Pull jobs from a storage in this many processes; 1 is this process."""
    storage: str | None = None
    """An Optuna storage URL; default a SQLite file in --out. Implies --workers 1."""
    shard: str | None = None
    """i/n: this process does the jobs i modulo n of a static grid; no storage."""
    trials: int | None = None
    """Choose so many points (needed where an axis is a range)."""
    sampler: Literal["grid", "random", "tpe"] = "grid"
    """With --workers, who chooses them: tpe learns from the results of all workers."""
    batch: int = 16
    """Points that a sampler chooses at once, run as one program."""
    chunk: int | None = None
    """Trials to one program at most; the default is the sweep file's, or all."""
    mesh: str = "trial"
    """Devices that a program's trials are split over, as in trial:4."""
    heartbeat: int = 30
    """Seconds between a worker's signs of life."""
    grace: int = 120
    """Seconds of silence after which its job is given to another worker."""
    distributed: bool = False
    """This process is one of several of an SPMD worker (jax.distributed)."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where JAX cannot find it out (TPU and Slurm: it can)."""
    processes: int | None = None
    """With --coordinator, how many processes the worker has."""
    process: int | None = None
    """With --coordinator, the number of this one."""
    quick: bool = False
    """A sweep of seconds: two values of each axis, steps as the file's `quick` says."""


def load(file: Path) -> Sweep:
    """The `sweep` of a sweep file."""
    if not file.exists():
        raise ValueError(
            f"no sweep file {file}. A clone has some in experiments/sweeps."
        )
    found = getattr(cli.import_file(file), "sweep", None)
    if not isinstance(found, Sweep):
        raise ValueError(
            f"{file} must set `sweep = sdegen.Sweep(...)`, got {found!r:.60}."
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` defaults to the command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    flags = os.environ.get("XLA_FLAGS", "")
    if "device_count" not in flags:
        # Before JAX starts: a CPU is as many devices as cores, shared by the workers.
        cores = (os.cpu_count() or 1) // int(os.environ.get("SDEGEN_WORKERS", "1"))
        count = f"--xla_force_host_platform_device_count={max(cores, 1)}"
        os.environ["XLA_FLAGS"] = f"{flags} {count}"
    cli.run(lambda config: execute(config, words, flags), Config, words)


def execute(config: Config, words: Sequence[str] = (), flags: str = "") -> None:
    """Do what `config` says; workers are started with the same `words` and XLA flags.

    **Raises:** ValueError for options that do not go together, or a wrong sweep file.
    """
    plan = _plan(config)
    out = (config.out or Path("runs/sweeps") / config.file.stem).expanduser()
    if config.dry_run:
        return _list(plan, config)
    if config.status:
        return _show(plan, out)
    pulls = config.workers > 0 or config.storage is not None
    begun = (out / "jobs").is_dir() and any((out / "jobs").iterdir())
    if begun and not (config.resume or config.storage or config.shard):
        raise ValueError(
            f"{out} holds a sweep that has begun: --resume goes on with it (if it is "
            "this one), --status shows it, another --out starts anew."
        )
    if pulls and config.shard:
        raise ValueError(
            "a shard needs no storage, and workers no shards: choose one of them."
        )
    if config.workers > 1:
        return _spawn(plan, config, out, words, flags)
    if config.distributed:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(config.coordinator, config.processes, config.process)
    cli.compile_cache()
    mesh = make_mesh(config.mesh) if jax.device_count() > 1 else None
    options = {"mesh": mesh, "watch": Best(), "progress": sys.stderr.isatty()}
    if pulls:
        names = ("storage", "batch", "heartbeat", "grace")
        options |= {name: getattr(config, name) for name in names}
        sampler = None if config.sampler == "grid" else config.sampler
        results = work(plan, out, sampler=sampler, **options)
    else:
        results = run(plan, directory=out, shard=_shard(config.shard), **options)
    if jax.process_index() == 0:
        _finish(plan, results, out)


def _plan(config):
    """The sweep of the file, as the options change it."""
    plan = load(config.file)
    changes = {"trials": config.trials, "chunk": config.chunk}
    changes: dict[str, Any] = {k: v for k, v in changes.items() if v is not None}
    if config.quick:
        parts = plan.axes.parts
        changes["space"] = [{n: _two(v) for n, v in part.items()} for part in parts]
        if plan.config is not None and hasattr(plan.config, "quick"):
            changes["config"] = dataclasses.replace(plan.config, quick=True)
    return dataclasses.replace(plan, **changes)


def _shard(text):
    match = re.fullmatch("([0-9]+)/([0-9]+)", "0/1" if text is None else text)
    if match is None:
        raise ValueError(f"--shard is i/n, as in 0/4 to 3/4, got {text!r}.")
    return int(match[1]), int(match[2])


def _two(values):
    """The first two values of an axis, or the range that it is."""
    if isinstance(values, Between):
        return values
    if isinstance(values, Static):
        return Static(**dict(list(values.values.items())[:2]))
    return list(values)[:2]


def _list(plan, config):
    """The trials as a table, and what they would be run as."""
    if config.trials is not None and config.sampler == "tpe":
        print(f"{config.trials} points, chosen by tpe {config.batch} at a time")
        return
    parts = _shard(config.shard)[1]
    jobs = plan.jobs(parts)
    rows = [{"job": job.number} | point.row for job in jobs for point in job.points]
    print(table(rows))
    print(f"{len(rows)} trials, {len(jobs)} programs")


def _show(plan, out):
    """The results that are there, and the last lines of the ledger."""
    if not (out / "sweep.json").exists():
        raise ValueError(f"there is no sweep in {out}. Is --out right?")
    rows = finished_rows(out)
    if not rows:
        print(f"no finished job in {out} yet")
    else:
        _finish(plan, plan.results(rows), out)
    print("\n".join((out / "ledger.txt").read_text().splitlines()[-5:]))


def _spawn(plan, config, out, words, flags):
    """Workers in processes of their own; this one reports what they have done."""
    command = [sys.executable, "-m", "sdegen.sweeps", *words]
    command += ["--workers", "1", "--resume", "--out", str(out.absolute())]
    points = plan.points() if config.sampler == "grid" else []
    if plan.chunk is None and 0 < len(plan.axes.jobs(points)) < config.workers:
        command += ["--chunk", str(-(-len(points) // config.workers))]
    environment = os.environ | {"SDEGEN_WORKERS": str(config.workers)}
    environment["XLA_FLAGS"] = flags
    out.parent.mkdir(parents=True, exist_ok=True)
    logs = [out.parent / f"{out.name}.worker-{i}.log" for i in range(config.workers)]
    options = {"stderr": subprocess.STDOUT, "env": environment}
    started = [
        subprocess.Popen(command, stdout=log.open("w"), **options) for log in logs
    ]
    watch, seen = Best(), -1
    try:
        while any(process.poll() is None for process in started):
            rows = finished_rows(out)
            if len(rows) != seen:
                watch(plan.results(rows))
                seen = len(rows)
            time.sleep(1)
    except BaseException:
        for process in started:
            process.terminate()
        raise
    bad = [i for i, process in enumerate(started) if process.returncode]
    _finish(plan, plan.results(finished_rows(out)), out)
    if bad:
        raise ValueError(
            f"{len(bad)} of {config.workers} workers ended with an error: see "
            f"{logs[bad[0]]}. What is finished is kept; --resume goes on."
        )


class Best:
    """Prints the best points so far; on a terminal a table, over the one before."""

    def __init__(self):
        self.lines = 0

    def __call__(self, results: Results) -> None:
        """Print the best of `results`."""
        done = f"{len(results.rows)} trials done"
        if results.rows and sys.stdout.isatty():
            back = f"\x1b[{self.lines}A\x1b[J" if self.lines else ""
            text = f"{done}\n{results.table(8)}"
            self.lines = text.count("\n") + 1
            print(back + text, flush=True)
        elif results.rows:
            print(f"{done}; best: {results.line()}", flush=True)


def _finish(plan, results, out):
    if not results.rows:
        print("no trial finished")
        return
    results.save(out)
    print(results.table(12))
    print(f"{len(results.rows)} trials: {status_counts(results.rows)}")
    metric = results.metric or next(iter(results.metrics), None)
    summary = results.summary()
    files = "results.csv, results.jsonl, summary.csv"
    if metric is not None and any(row["seeds"] for row in summary):
        sweep_plot(out / "sweep.png", summary, results.axes, metric)
        files += ", sweep.png"
    print(f"in {out}: {files}, ledger.txt")
