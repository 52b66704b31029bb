"""Workers that pull jobs: whoever is killed, no finished trial is lost or repeated."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from test_sweep import CALL, STEPS, train

from sdegen.runs.recorder import describe
from sdegen.sweeps import Between, Halving, Static, Sweep, command, run, work
from sdegen.sweeps import queue as slots
from sdegen.sweeps.program import Program
from sdegen.sweeps.queue import Slots

optuna = pytest.importorskip("optuna", minversion="5.0")

pytestmark = pytest.mark.usefixtures("float32")
ROOT = Path(__file__).parent.parent
SPACE = {"beta": Static(short=5.0, mid=10.0, long=20.0), "rate": [1e-3, 1e-2]}
FAST = {"heartbeat": 1, "grace": 2, "progress": False}


class _Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def exact():
    """The rows of the sweep by one process, which no storage has seen."""
    with jax.enable_x64(False):
        return run(Sweep(train, SPACE, metric="error"), progress=False).rows


@pytest.fixture(scope="module")
def postgres():
    """The URL of a PostgreSQL server of our own on a loopback port."""
    pytest.importorskip("psycopg")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    found = shutil.which("initdb")
    if not programs and found is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    programs = Path(found).parent if found else programs[-1]
    # The server refuses to be root, which the tests of a container often are, and its
    # user must see the folder: pytest's own are private.
    place = Path(tempfile.mkdtemp(prefix="sdegen-postgres-"))
    user = {"user": "postgres"} if os.getuid() == 0 else {}
    if user:
        shutil.chown(place, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def call(*command):
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, cwd=place, **user
        )

    data, log = place / "data", place / "log"
    call(programs / "initdb", "-D", data, "-A", "trust", "-U", "sdegen", "--no-sync")
    options = f"-p {port} -h 127.0.0.1 -k '' -F"
    call(programs / "pg_ctl", "-D", data, "-l", log, "-o", options, "-w", "start")
    yield f"postgresql+psycopg://sdegen@127.0.0.1:{port}/postgres"
    call(programs / "pg_ctl", "-D", data, "-m", "immediate", "stop")
    shutil.rmtree(place, ignore_errors=True)


def die_at(monkeypatch, job, step):
    """Die in a program's call as by SIGKILL: nothing is handed back or told."""
    advance, begun = Program.advance, []

    def dying(self, leaves, start, count):
        if start == 0:
            begun.append(self)
        if len(begun) == job and start == step:
            raise _Killed
        return advance(self, leaves, start, count)

    monkeypatch.setattr(Program, "advance", dying)
    monkeypatch.setattr(Slots, "close", lambda self: self.life.close())


def watch_steps(monkeypatch):
    advance, steps = Program.advance, []

    def seen(self, leaves, start, count):
        steps.append(start)
        return advance(self, leaves, start, count)

    monkeypatch.setattr(Program, "advance", seen)
    return steps


@pytest.mark.parametrize("storage", ["sqlite", "postgres"])
def test_a_lost_job_goes_on_from_its_checkpoint(
    storage, request, exact, tmp_path, monkeypatch
):
    url = None if storage == "sqlite" else request.getfixturevalue("postgres")
    plan, place = Sweep(train, SPACE, metric="error"), tmp_path / "swept"
    options = {"storage": url, "save_every": CALL, **FAST}
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        die_at(patch, 2, 3 * CALL)
        work(plan, place, **options)
    steps = watch_steps(monkeypatch)
    results = work(plan, place, **options)
    assert describe(results.rows) == describe(exact)
    # The second job from step 12 on, the third whole, nothing of the first.
    per_job = STEPS // CALL
    assert len(steps) == (per_job - 3) + per_job
    # In which order depends on when the silence was noticed.
    assert steps.count(3 * CALL) == 2 and steps.count(0) == 1
    ledger = (place / "ledger.txt").read_text()
    assert ledger.count("begins") == 3 and ledger.count("goes on") == 1
    # Told to start once more, there is nothing left to do.
    steps.clear()
    assert describe(work(plan, place, **options).rows) == describe(exact) and not steps


def test_a_job_that_was_finished_but_not_told_is_not_repeated(
    exact, tmp_path, monkeypatch
):
    plan = Sweep(train, SPACE, metric="error")

    def silent(self, rows):
        raise _Killed

    with monkeypatch.context() as patch, pytest.raises(_Killed):
        from sdegen.sweeps.queue import Grid

        patch.setattr(Grid, "report", silent)
        patch.setattr(Slots, "close", lambda self: self.life.close())
        work(plan, tmp_path, **FAST)
    steps = watch_steps(monkeypatch)
    results = work(plan, tmp_path, **FAST)
    assert describe(results.rows) == describe(exact)
    assert steps.count(0) == 2


def test_an_error_in_one_job_spoils_no_other(tmp_path):
    def trial(key, beta, rate):
        if beta == 10.0:
            raise ZeroDivisionError("no such schedule")
        return {"error": rate * beta}

    plan = Sweep(trial, SPACE, metric="error")
    with pytest.raises(ZeroDivisionError, match="no such schedule"):
        work(plan, tmp_path, **FAST)
    results = plan.results([json.loads(t) for t in _lines(tmp_path)])
    assert sorted(row["beta"] for row in results.rows) == ["long"] * 2 + ["short"] * 2
    assert "failed: no such schedule" in (tmp_path / "ledger.txt").read_text()


def _lines(place):
    files = sorted((place / "jobs").glob("*/results.jsonl"))
    return [line for file in files for line in file.read_text().splitlines()]


def bowl(key, a, b, shape):
    """A trial with a known best: a = 0.01 (on a log scale), b = 2."""
    noise = 1e-3 * jax.random.normal(key, ())
    bend = {"flat": 1.0, "steep": 3.0}[shape]
    value = bend * (jax.numpy.log10(a) + 2) ** 2 + (b - 2) ** 2
    return {"value": value + noise, "seen": a}


def test_tpe_asks_for_several_runs_one_program_and_learns(tmp_path, monkeypatch):
    space = {
        "a": Between(1e-5, 1e1, log=True),
        "b": Between(-10, 10),
        "shape": Static("flat", "steep"),
        "seed": range(2),
    }
    evaluate, widths = Program.evaluate, []
    monkeypatch.setattr(
        Program,
        "evaluate",
        lambda self: widths.append(len(self.points)) or evaluate(self),
    )
    seeded = optuna.samplers.TPESampler(seed=0, constant_liar=True)
    monkeypatch.setattr(slots, "make_sampler", lambda *_: seeded)
    plan = Sweep(bowl, space, metric="value", trials=48)
    results = work(plan, tmp_path, sampler="tpe", batch=12, **FAST)
    assert len(results.rows) == 96 and len(results.summary()) == 48
    assert sum(widths) == 96 and max(widths) >= 12
    values = np.array([row["value"] for row in results.summary()])
    late = [row["value"] for row in results.rows if row["trial"] >= 72]
    early = [row["value"] for row in results.rows if row["trial"] < 24]
    # Points drawn evenly have a median of about 30, and no better ones later.
    print(f"median {np.median(early):.1f}, late {np.median(late):.1f}, {values[0]:.2f}")
    assert np.median(late) < np.median(early) / 2 and values[0] < 3
    study = optuna.load_study(
        study_name=tmp_path.name, storage=f"sqlite:///{tmp_path}/storage.db"
    )
    done = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert len(done) == 48
    best = results.best()[0]
    assert np.isclose(study.best_value, best["value"])
    assert study.best_params["a"] == best["a"]


def test_a_lost_batch_goes_on_as_the_batch_it_was(tmp_path, monkeypatch):
    space = {"rate": Between(1e-4, 1e-2, log=True), "seed": range(2)}
    plan = Sweep(train, space, metric="error", trials=6)
    options = {"sampler": "random", "batch": 3, "save_every": CALL, **FAST}
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        die_at(patch, 1, 4 * CALL)
        work(plan, tmp_path, **options)
    (held,) = (tmp_path / "jobs").iterdir()
    steps = watch_steps(monkeypatch)
    results = work(plan, tmp_path, **options)
    per_job = STEPS // CALL
    assert len(results.rows) == 12 and len(steps) == (per_job - 4) + per_job
    assert sorted(p.name for p in (tmp_path / "jobs").iterdir()) == [
        "batch-0000",
        "batch-0003",
    ]
    for row in results.rows:
        assert row["status"] == "ok"


def test_halving_over_workers_stops_the_worse(tmp_path):
    space = {"rate": Between(1e-6, 1e-2, log=True)}
    plan = Sweep(train, space, metric="error", trials=8, halving=Halving(2, 2))
    results = work(plan, tmp_path, sampler="random", batch=8, **FAST)
    kinds = [row["status"] for row in results.rows]
    assert kinds.count("ok") >= 1 and kinds.count("stopped") >= 3
    study = optuna.load_study(
        study_name=tmp_path.name, storage=f"sqlite:///{tmp_path}/storage.db"
    )
    pruned = [t for t in study.trials if t.state.name == "PRUNED"]
    assert len(pruned) == kinds.count("stopped")
    assert all(t.intermediate_values for t in study.trials)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": "tpe"}, "how many points to choose"),
        ({"storage": "nonsense"}, "cannot be used"),
        ({"storage": "postgresql+psycopg://me:secret@127.0.0.1:1/x"}, r"\.\.\.@127"),
    ],
)
def test_bad_input_gets_a_sentence(options, words, tmp_path):
    plan = Sweep(train, SPACE, metric="error")
    with pytest.raises(ValueError, match=words) as caught:
        work(plan, tmp_path, **options, **FAST)
    assert "secret" not in str(caught.value)


def test_a_storage_of_another_sweep_is_refused(tmp_path):
    def trial(key, x):
        return {"y": x}

    url = f"sqlite:///{tmp_path}/storage.db"
    first, second = tmp_path / "a" / "same", tmp_path / "b" / "same"
    work(Sweep(trial, {"x": [1.0]}), first, storage=url, **FAST)
    with pytest.raises(ValueError, match="another sweep called 'same'"):
        work(Sweep(trial, {"x": [2.0]}), second, storage=url, **FAST)


FILE = """
import sys
sys.path.insert(0, {tests!r})
from test_workers import SPACE, train
from sdegen.sweeps import Sweep
sweep = Sweep(train, SPACE, metric="error")
"""


def start(file, out, *more):
    """The command line, as a user starts it."""
    names = ("PATH", "HOME", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {k: v for k, v in os.environ.items() if k in names or "_CACHE_" in k}
    environment |= {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}
    command = [sys.executable, "-m", "sdegen.sweeps", str(file), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--heartbeat", "1", "--grace", "2", *more],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("file", "options", "words"),
    [
        ("nowhere.py", {}, "no sweep file"),
        ("conftest.py", {}, "must set `sweep = "),
        ("file.py", {"shard": "4"}, "--shard is i/n"),
        ("file.py", {"shard": "4/4"}, "0 <= i < n"),
        ("file.py", {"shard": "0/2", "workers": 1}, "choose one of them"),
        ("file.py", {"status": True}, "there is no sweep in"),
    ],
)
def test_the_command_line_answers_with_sentences(file, options, words, tmp_path):
    (tmp_path / "file.py").write_text(FILE.format(tests=str(Path(__file__).parent)))
    place = Path(__file__).parent if file == "conftest.py" else tmp_path
    with pytest.raises(ValueError, match=words):
        command.execute(command.Config(place / file, tmp_path / "out", **options))
    assert not (tmp_path / "out" / "results.csv").exists()


def test_a_dry_run_lists_the_trials_and_runs_nothing(tmp_path, capsys):
    (tmp_path / "file.py").write_text(FILE.format(tests=str(Path(__file__).parent)))
    out = tmp_path / "out"
    command.execute(command.Config(tmp_path / "file.py", out, dry_run=True))
    text = capsys.readouterr().out
    assert "6 trials, 3 programs" in text and len(text.splitlines()) == 9
    assert not out.exists()


def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < end, process.stdout.read()
        time.sleep(0.02)
    return found


@pytest.mark.slow
def test_a_worker_may_be_several_processes(exact, tmp_path):
    file, out = tmp_path / "file.py", tmp_path / "out"
    file.write_text(FILE.format(tests=str(Path(__file__).parent)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [
        start(
            *(file, out, "--workers", "1", "--distributed"),
            *("--coordinator", f"127.0.0.1:{port}"),
            *("--processes", "2", "--process", str(number)),
        )
        for number in range(2)
    ]
    texts = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert "6 trials: 6 ok" in texts[0] and "done" not in texts[1]
    rows = [json.loads(t) for t in (out / "results.jsonl").read_text().splitlines()]
    for row, other in zip(rows, describe(list(exact)), strict=True):
        np.testing.assert_allclose(row["error"], other["error"], rtol=1e-5)
    assert (out / "ledger.txt").read_text().count("begins") == 3


@pytest.mark.slow
def test_workers_and_driver_are_killed_and_the_table_is_the_same(exact, tmp_path):
    file, out = tmp_path / "file.py", tmp_path / "out"
    file.write_text(FILE.format(tests=str(Path(__file__).parent)))
    driver = start(file, out, "--workers", "2")

    def begun():
        ledger = out / "ledger.txt"
        lines = ledger.read_text().splitlines() if ledger.exists() else []
        return [line for line in lines if " begins" in line]

    victim = wait_for(begun, driver)[0]
    pid = int(victim.split("  ")[1].rpartition(":")[2])
    assert pid != driver.pid
    os.kill(pid, signal.SIGKILL)  # a worker, in the middle of its first job
    wait_for(lambda: list((out / "jobs").glob("*/results.jsonl")), driver)
    driver.kill()
    driver.wait()
    again = start(file, out, "--workers", "1", "--resume")
    text, _ = again.communicate(timeout=300)
    assert again.returncode == 0, text
    rows = [json.loads(t) for t in (out / "results.jsonl").read_text().splitlines()]
    for row, other in zip(rows, describe(list(exact)), strict=True):
        assert row["trial"] == other["trial"] and row["status"] == other["status"]
        # Compiled for other devices than in this process.
        np.testing.assert_allclose(row["error"], other["error"], rtol=1e-5)
    ledger = (out / "ledger.txt").read_text()
    assert ledger.count(" done: ") == 3  # nothing finished was done twice
    assert (out / "sweep.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="holds a sweep that has begun"):
        command.execute(command.Config(file, out))
