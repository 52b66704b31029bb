"""Sweeps: trials side by side give what each gives alone, whatever happens to one."""

import dataclasses
import json
import os
import signal

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdegen
from sdegen import mesh, metrics, nets, prediction
from sdegen.data import mixture
from sdegen.runs.recorder import describe
from sdegen.sweeps import (
    Between,
    Halving,
    Results,
    Static,
    Sweep,
    Training,
    override,
    run,
    sweep,
)
from sdegen.sweeps.job import JobOptions, run_job
from sdegen.sweeps.program import Program
from sdegen.sweeps.space import Space
from sdegen.sweeps.trial import bind

pytestmark = pytest.mark.usefixtures("float32")
STEPS, CALL = 24, 4
DATA = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
SPACE = {"rate": [1e-3, 1e-2, 1e30], "beta": [10.0, 20.0], "seed": [3, 4]}


class Mean(sdegen.AbstractModel):
    """A model of two numbers, which compiles in a moment."""

    network: jax.Array


def mean_loss(model, key, x0, cond=None, *, beta, axis_name=None):
    """The square distance from data with noise in them."""
    noise = jax.random.normal(key, x0.shape, x0.dtype)
    return jnp.mean((model.network - x0 - beta * noise) ** 2)


def train(key, rate=1e-3, beta=20.0, optimizer=sdegen.AdamW, steps=STEPS):
    """A mean that is learned; a rate of 1e30 goes non-finite."""

    def evaluate(key, model):
        near = jnp.asarray(DATA) + 0.01 * jax.random.normal(key, DATA.shape)
        return {"error": jnp.mean((model.network - near) ** 2)}

    return Training(
        Mean(jax.random.normal(key, (2,))),
        DATA,
        steps=steps,
        batch_size=8,
        optimizer=optimizer(learning_rate=rate, warmup=2),
        loss=eqx.Partial(mean_loss, beta=beta),
        steps_per_call=CALL,
        evaluate=evaluate,
    )


def flow(key, rate, beta):
    """A small flow whose rate and schedule are swept."""
    model = sdegen.Denoiser(
        nets.MLPConfig(width=8, depth=1)((2,), key),
        sdegen.VP(beta_max=beta),
        prediction.v,
    )

    def evaluate(key, denoiser):
        out = sdegen.sample(key, denoiser, (16, 2), grid=3)
        return {"spread": out.x.std()}

    optimizer = sdegen.Lion(learning_rate=rate, warmup=2)
    return Training(
        model,
        DATA,
        steps=STEPS,
        batch_size=8,
        optimizer=optimizer,
        steps_per_call=CALL,
        evaluate=evaluate,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The sweep of this file, left alone, in a folder."""
    place = tmp_path_factory.mktemp("sweep") / "whole"
    with jax.enable_x64(False):
        options = {"metric": "error", "directory": place, "progress": False}
        return place, sweep(train, SPACE, **options)


def test_every_trial_is_what_fit_gives_alone():
    space = {"rate": [1e-3, 1e-2], "beta": [10.0, 20.0], "seed": [3, 4]}
    results = sweep(flow, space, metric="spread", progress=False)
    for row in (results.rows[1], results.rows[6]):
        alone = flow(jax.random.key(row["seed"]), row["rate"], row["beta"])
        fitted = alone.fit(seed=row["seed"], progress=False)
        late = np.arange(STEPS) >= 0.9 * STEPS
        np.testing.assert_allclose(row["loss"], fitted.losses[late].mean(), rtol=1e-4)
        key = jax.random.fold_in(jax.random.key(row["seed"]), 2**31 - 2)
        spread = alone.evaluate(key, fitted.model)["spread"]
        np.testing.assert_allclose(row["spread"], spread, rtol=1e-4)


def test_a_trial_that_goes_non_finite_is_reported_and_hurts_no_other(whole):
    _, results = whole
    bad = [row for row in results.rows if row["rate"] > 1]
    assert len(bad) == 4
    assert all(r["status"] == "non-finite" and 0 <= r["step"] < STEPS for r in bad)
    without = {**SPACE, "rate": [1e-3, 1e-2]}
    alone = sweep(train, without, metric="error", progress=False)
    fine = [row for row in results.rows if row["rate"] < 1]
    for row, other in zip(fine, alone.rows, strict=True):
        assert row["status"] == other["status"] == "ok"
        assert row["loss"] == other["loss"] and row["error"] == other["error"]


@pytest.mark.parametrize("lanes", [1, 2, 64])
def test_lanes_and_devices_change_nothing(whole, lanes):
    _, results = whole
    devices = mesh.make_mesh("trial:4")
    other = sweep(
        train, SPACE, metric="error", mesh=devices, lanes=lanes, progress=False
    )
    for row, spread in zip(results.rows, other.rows, strict=True):
        assert row["status"] == spread["status"]
        if row["status"] == "ok":
            np.testing.assert_allclose(row["loss"], spread["loss"], rtol=1e-4)
            np.testing.assert_allclose(row["error"], spread["error"], rtol=1e-4)


@pytest.mark.parametrize("optimizer", [sdegen.Lion, sdegen.AdamW])
def test_trials_are_split_over_the_devices_and_nothing_is_exchanged(optimizer):
    points = Space({"rate": [1e-3, 1e-2], "seed": range(8)}).grid()
    devices = mesh.make_mesh("trial:8")
    program = Program(bind(train, None, {"optimizer": optimizer}), points, devices)
    leaves = program.begin()
    leaves, losses = program.advance(leaves, 0, CALL)
    for leaf in (*leaves, *losses.values()):
        assert leaf.shape[0] == 16
        shards = leaf.addressable_shards
        assert len({shard.device for shard in shards}) == 8
        assert {shard.data.shape[0] for shard in shards} == {2}
    (compiled,) = [c for (name, _), c in program._compiled.items() if "adv" in name]
    text = compiled.as_text()
    words = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    assert "while" in text and not any(word in text for word in words)


def test_one_trace_for_all_trials():
    traces = []

    def trial(key, scale):
        traces.append(1)
        return {"x": scale * jax.random.normal(key, ())}

    results = sweep(trial, {"scale": [1.0, 2.0, 3.0], "seed": range(5)})
    assert len(traces) == 2  # once for its shapes, once for the program
    for row in results.rows:
        exact = row["scale"] * jax.random.normal(jax.random.key(row["seed"]), ())
        np.testing.assert_allclose(row["x"], exact, rtol=1e-6)


def test_statistics_over_seeds_are_the_textbooks():
    rows = [
        {"trial": i, "a": a, "seed": s, "status": "ok", "m": m}
        for i, (a, s, m) in enumerate(
            [(1, 0, 2.0), (1, 1, 4.0), (1, 2, 9.0), (2, 0, 1.0)]
        )
    ]
    rows.append({"trial": 4, "a": 2, "seed": 1, "status": "non-finite"})
    best, other = Results(rows, ["a"], "m").summary()
    assert (best["a"], best["m"], best["seeds"], best["lost"]) == (2, 1.0, 1, 1)
    assert np.isnan(best["m se"])
    # 2, 4, 9: mean 5, variance 13 by hand
    assert other["m"] == 5.0 and np.isclose(other["m se"], np.sqrt(13 / 3))
    up = Results(rows, ["a"], "m", "max").summary()
    assert [row["a"] for row in up] == [1, 2]


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", [3, 5])
def test_a_sweep_that_was_killed_goes_on_in_the_same_bits(
    whole, tmp_path, monkeypatch, moment
):
    place, results = whole
    advance, calls = Program.advance, []

    def dying(self, leaves, step, count):
        calls.append(step)
        if len(calls) == moment:
            raise _Killed
        return advance(self, leaves, step, count)

    options = {"metric": "error", "save_every": CALL, "progress": False}
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(Program, "advance", dying)
        sweep(train, SPACE, directory=tmp_path, **options)
    again = []
    monkeypatch.setattr(
        Program,
        "advance",
        lambda self, leaves, step, count: (
            again.append(step) or advance(self, leaves, step, count)
        ),
    )
    resumed = sweep(train, SPACE, directory=tmp_path, **options)
    assert again[0] == CALL * (moment - 1)  # nothing that was saved is done again
    assert describe(resumed.rows) == describe(results.rows)
    again.clear()
    once_more = sweep(train, SPACE, directory=tmp_path, **options)
    assert not again and describe(once_more.rows) == describe(results.rows)
    ledger = (tmp_path / "ledger.txt").read_text()
    assert "begins" in ledger and "goes on" in ledger and "8 ok, 4 non-finite" in ledger


def test_it_leaves_in_good_order_when_told_to_stop(whole, tmp_path, monkeypatch):
    _, results = whole
    advance = Program.advance

    def told(self, leaves, step, count):
        if step == 2 * CALL:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self, leaves, step, count)

    options = {"metric": "error", "directory": tmp_path, "progress": False}
    with monkeypatch.context() as patch, pytest.raises(sdegen.Preempted):
        patch.setattr(Program, "advance", told)
        sweep(train, SPACE, **options)
    resumed = sweep(train, SPACE, **options)
    assert describe(resumed.rows) == describe(results.rows)


def test_memory_that_is_short_takes_fewer_trials_at_a_time(whole, monkeypatch):
    _, results = whole
    job = Sweep(train, SPACE).jobs()[0]
    options = JobOptions(train, metric="error", progress=False)
    # As much as five trials take side by side: the lanes go first, then the width.
    few = Program(bind(train, None, {}), job.points[:5], lanes=1)
    few.advance(few.begin(), 0, CALL)
    from sdegen.sweeps import program

    needed = max(program._memory(c) for c in few._compiled.values())
    monkeypatch.setattr(Program, "_memory_there", lambda self: needed / 0.8 + 1)
    widths, begin = [], Program.begin
    monkeypatch.setattr(
        Program, "begin", lambda self: widths.append(self.width) or begin(self)
    )
    rows = run_job(job, options)
    assert widths[0] == 12 and max(widths[1:]) < 12 and len(widths) > 2
    assert describe(rows) == describe(results.rows)


def test_halving_stops_the_worse_and_changes_nothing_for_the_rest(
    tmp_path, monkeypatch
):
    space = {"rate": [1e-5, 1e-4, 1e-3, 3e-3], "seed": range(2)}
    options = {"metric": "error", "progress": False, "save_every": CALL}
    whole = sweep(train, space, **options)
    some = sweep(train, space, halving=Halving(2, 2), **options)
    stopped = [row for row in some.rows if row["status"] == "stopped"]
    # 8 trials: 4 stop after a quarter of the steps, and 2 of the others after a half.
    assert sorted(row["step"] for row in stopped) == [8, 8, 8, 8, 12, 12]
    assert all(row["error"] > 0 for row in stopped)
    for row, full in zip(some.rows, whole.rows, strict=True):
        if row["status"] == "ok":
            assert row["error"] == full["error"] and row["loss"] == full["loss"]
    # Killed after the first rung, with a narrower program on disk.
    advance, calls = Program.advance, []

    def dying(self, leaves, step, count):
        calls.append(self.width)
        if len(calls) == 5:
            raise _Killed
        return advance(self, leaves, step, count)

    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(Program, "advance", dying)
        sweep(train, space, halving=Halving(2, 2), directory=tmp_path, **options)
    assert calls == [8, 8, 4, 2, 2]
    resumed = sweep(train, space, halving=Halving(2, 2), directory=tmp_path, **options)
    assert describe(resumed.rows) == describe(some.rows)


def test_halving_by_the_loss_compares_the_losses_of_the_last_call():
    """Known before the last tenth of the steps, from which the final one is taken."""
    space = {"rate": [1e-5, 3e-1], "beta": [0.0], "seed": range(2)}
    options = {"metric": "loss", "halving": Halving(2, 1), "progress": False}
    rows = sweep(train, space, **options).rows
    half = STEPS // 2
    exact = []
    for row in rows:
        alone = train(jax.random.key(row["seed"]), row["rate"], row["beta"])
        losses = alone.fit(seed=row["seed"], progress=False).losses
        exact.append(losses[half - CALL : half].mean())
    worse = set(np.argsort(exact)[2:])
    assert {row["trial"] for row in rows if row["status"] == "stopped"} == worse
    for row in rows:
        if row["status"] == "stopped":
            assert row["step"] == half
            np.testing.assert_allclose(row["loss"], exact[row["trial"]], rtol=1e-5)


def test_halving_keeps_the_best_by_either_goal():
    values = {1: 0.3, 2: 0.1, 3: float("nan"), 4: 0.2, 5: 0.5}
    assert Halving(2).stop(values, "min") == {3, 5}
    assert Halving(2).stop(values, "max") == {3, 2}
    assert Halving(4, 2).steps(1000, 50) == [100, 250]


def test_shards_are_the_whole(whole, tmp_path):
    _, results = whole
    plan = Sweep(train, SPACE, metric="error")
    parts = [
        run(plan, directory=tmp_path, shard=(i, 3), progress=False) for i in (2, 0, 1)
    ]
    assert len(parts[0].rows) == 4 and len(parts[1].rows) == 8
    for row, other in zip(parts[2].rows, results.rows, strict=True):
        assert row["status"] == other["status"]
        if row["status"] == "ok":
            np.testing.assert_allclose(row["error"], other["error"], rtol=1e-5)


def test_static_values_make_programs_and_a_list_of_spaces_is_a_union():
    space = [
        {"optimizer": Static(lion=sdegen.Lion), "rate": [1e-4], "seed": [0, 1]},
        {"optimizer": Static(adamw=sdegen.AdamW), "rate": [1e-3, 1e-2]},
    ]
    plan = Sweep(train, space, chunk=1)
    assert [len(job.points) for job in Sweep(train, space).jobs()] == [2, 2]
    assert len(plan.jobs()) == 4
    assert [job.static["optimizer"] for job in plan.jobs()] == (
        [sdegen.Lion] * 2 + [sdegen.AdamW] * 2
    )
    assert [p.number for job in plan.jobs() for p in job.points] == [0, 1, 2, 3]


def test_drawn_points_follow_the_law_of_their_range():
    space = {"rate": Between(1e-4, 1e-1, log=True), "beta": [1.0, 2.0], "seed": [0, 1]}
    points = Space(space).draw(2000)
    assert len(points) == 4000 and points[0].values == points[1].values
    logs = np.log10([p.values["rate"] for p in points[::2]])
    assert metrics.ks(logs, lambda x: np.clip((x + 4) / 3, 0, 1)).p_value > 1e-3
    assert 900 < sum(p.values["beta"] == 1.0 for p in points[::2]) < 1100


def test_a_base_config_is_overridden_by_dotted_names():
    @dataclasses.dataclass(frozen=True)
    class Config:
        optimizer: sdegen.AdamW = dataclasses.field(default_factory=sdegen.AdamW)
        width: int = 8

    got = override(
        Config(),
        {"optimizer.learning_rate": 0.5, "optimizer": sdegen.Lion(b1=0.25), "width": 3},
    )
    assert isinstance(got.optimizer, sdegen.Lion) and got.width == 3
    assert (float(got.optimizer.learning_rate), float(got.optimizer.b1)) == (0.5, 0.25)
    with pytest.raises(ValueError, match="no field 'rate'; it has learning_rate"):
        override(Config(), {"optimizer.rate": 1.0})


def plain(key, rate, width=8):
    """A trial that needs `width` as a Python number."""
    return {"x": jnp.sum(jnp.zeros(int(width))) + rate}


@pytest.mark.parametrize(
    ("trial", "space", "options", "words"),
    [
        (plain, {}, {}, "the space is empty"),
        (plain, {"rate": []}, {}, "axis 'rate' is empty"),
        (plain, {"rate": ["a"]}, {}, "make the axis static"),
        (plain, {"rate": [1.0, np.nan]}, {}, "must be finite"),
        (plain, {"rate": 1.0}, {}, "needs a list of values"),
        (plain, {"speed": [1.0]}, {}, "no parameter 'speed'; it has rate, width"),
        (plain, {"rate": [1.0], "width": [2, 4]}, {}, "axis 'width' cannot be traced"),
        (plain, {"rate": [1.0]}, {"metric": "y"}, "no metric 'y'; they have x"),
        (plain, {"rate": Between(0.0, 1.0)}, {}, "is a range"),
        (plain, {"rate": [1.0]}, {"goal": "low"}, 'goal is "min" or "max"'),
        (plain, {"rate": [1.0]}, {"halving": Halving()}, "by which metric"),
        (lambda key, rate: {"x": jnp.ones(3)}, {"rate": [1.0]}, {}, "must be a scalar"),
        (lambda key, rate: rate, {"rate": [1.0]}, {}, "dict of scalar metrics"),
        (lambda key, rate: {"x": float(key)}, {"rate": [1.0]}, {}, "whatever its axes"),
        (train, {"rate": [1.0]}, {"metric": "fid"}, "they have error, loss"),
    ],
)
def test_bad_input_gets_a_sentence(trial, space, options, words):
    with pytest.raises(ValueError, match=words):
        sweep(trial, space, progress=False, **options)


def test_a_folder_of_another_sweep_is_refused(whole, tmp_path):
    place, _ = whole
    before = (place / "sweep.json").read_text()
    with pytest.raises(ValueError, match="holds another sweep: its space"):
        sweep(train, {"rate": [1e-3]}, metric="error", directory=place)
    with pytest.raises(ValueError, match="holds another sweep: its metric"):
        sweep(train, SPACE, metric="loss", directory=place)
    assert (place / "sweep.json").read_text() == before
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty and holds no sweep"):
        sweep(train, SPACE, directory=tmp_path)


def test_data_must_not_depend_on_the_trial():
    def trial(key, scale):
        spec = train(key)
        return dataclasses.replace(spec, data=scale * DATA)

    with pytest.raises(ValueError, match="same for all trials"):
        sweep(trial, {"scale": [1.0, 2.0]}, progress=False)


def test_measures_on_the_host_are_taken_trial_by_trial():
    def trial(key, rate):
        spec = train(key, rate, steps=CALL)
        return dataclasses.replace(
            spec,
            evaluate=lambda key, model: model.network + jnp.asarray(DATA),
            measure=lambda x: {"w2": metrics.w2(x, DATA)},
        )

    results = sweep(trial, {"rate": [1e-3, 1e-2]}, metric="w2", progress=False)
    spec = trial(jax.random.key(0), 1e-2)
    fitted = spec.fit(progress=False)
    exact = np.sqrt(np.sum(np.asarray(fitted.model.network) ** 2))  # a shift
    np.testing.assert_allclose(results.rows[1]["w2"], exact, rtol=1e-4)


def test_results_are_tidy_files(whole, tmp_path):
    _, results = whole
    results.save(tmp_path)
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0] == "trial,rate,beta,seed,status,step,error,loss"
    assert len(lines) == 13 and lines[-1].endswith("non-finite,2,,") is False
    rows = [
        json.loads(t) for t in (tmp_path / "results.jsonl").read_text().splitlines()
    ]
    assert rows == describe(list(results.rows))
    table = results.table(2)
    assert "+-" in table and "(2 lost)" in results.table()


def test_vmapped_guidance_like_parameters_are_swept_in_a_pure_trial():
    ring, x = mixture.ring(), jnp.asarray(DATA)

    def trial(key, beta):
        path = sdegen.VP(beta_max=beta)
        return {"x": ring.denoiser(path)(jnp.float32(0.5), x)[0, 0]}

    results = sweep(trial, {"beta": [5.0, 20.0]})
    for row in results.rows:
        path = sdegen.VP(beta_max=row["beta"])
        exact = ring.denoise(path, 0.5, x[0])[0]
        np.testing.assert_allclose(row["x"], exact, rtol=1e-5)


def test_the_program_does_not_retrace_from_call_to_call():
    points = Space({"rate": [1e-3, 1e-2]}).grid()
    program = Program(bind(train, None, {}), points)
    leaves = program.begin()
    for k in range(3):
        leaves, _ = program.advance(leaves, k * CALL, CALL)
    assert sum("advance" in name for name, _ in program._compiled) == 1
    chex.assert_tree_all_finite(eqx.filter(leaves, eqx.is_inexact_array))
