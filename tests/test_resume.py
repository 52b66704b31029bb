"""Runs that are killed, stopped, damaged and moved end like the one left alone."""

import contextlib
import functools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import nursery
import optax
import pytest
from jax.sharding import PartitionSpec as P

import sdegen
from sdegen import data, mesh, nets, prediction
from sdegen.runs import checkpoint, report
from sdegen.training import ema

pytestmark = pytest.mark.usefixtures("float32")


# -- killed, in processes of its own ---------------------------------------------------


def raise_run(directory, *arguments, devices=1, **environment):
    """Start nursery.py on `directory`."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, nursery.__file__, str(directory), *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": flags} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process, seconds=900):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def saved(directory, kind, step):
    return checkpoint.Checkpoints(Path(directory) / kind, keep=None).read(step)


def same_run(a, b):
    """Bit by bit: rows, the last state, every snapshot of the averages."""
    assert (a / "rows.jsonl").read_bytes() == (b / "rows.jsonl").read_bytes()
    rows = [json.loads(row) for row in (a / "rows.jsonl").read_text().splitlines()]
    calls = range(nursery.CALL, nursery.STEPS + 1, nursery.CALL)
    assert [row["step"] for row in rows] == list(calls)  # no gap, none twice
    for kind in ("checkpoints", "averages"):
        steps = [checkpoint.Checkpoints(d / kind, keep=None).steps() for d in (a, b)]
        assert steps[0] == steps[1] and steps[0][-1] == nursery.STEPS
        for step in steps[0]:
            chex.assert_trees_all_equal(saved(a, kind, step), saved(b, kind, step))


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "spec"), [(1, ""), (8, "data:2,fsdp:4")])
def test_a_run_killed_at_random_ends_in_the_bits_of_the_quiet_one(
    tmp_path, devices, spec
):
    options = {"devices": devices, "NURSERY_MESH": spec}
    kills = [signal.SIGKILL] * 10 + [signal.SIGTERM] * 3
    order = np.random.default_rng(devices).permutation(len(kills))
    kills = [int(kills[i]) for i in order]
    assert outcome(raise_run(tmp_path / "quiet", 0, **options)) == [0]
    codes = outcome(raise_run(tmp_path / "killed", devices, *kills, **options))
    ended = {int(signal.SIGKILL): -9, int(signal.SIGTERM): sdegen.training.PREEMPTED}
    assert codes == [ended[kill] for kill in kills] + [0]
    same_run(tmp_path / "quiet", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(tmp_path):
    """Told once, both save and leave with the code; one process ends the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"devices": 4, "NURSERY_MESH": "data:8"}
    one = raise_run(tmp_path / "one", 0, devices=8, NURSERY_MESH="data:8")
    assert outcome(one) == [0]
    both = [
        raise_run(tmp_path / "two", "--process", i, port, **options) for i in range(2)
    ]
    codes = []
    for process in both:
        _, err = process.communicate(timeout=300)
        codes.append(process.returncode)
    assert codes == [sdegen.training.PREEMPTED] * 2, err
    reached = checkpoint.Checkpoints(tmp_path / "two" / "checkpoints").steps()[-1]
    assert 0 < reached < nursery.STEPS
    with warnings.catch_warnings():
        rest = outcome(raise_run(tmp_path / "two", 0))
    assert rest == [0]
    close_runs(tmp_path / "one", tmp_path / "two")


def close_runs(a, b):
    """The same steps, and numbers equal up to the order of sums."""
    rows = [
        [json.loads(row) for row in (d / "rows.jsonl").read_text().splitlines()]
        for d in (a, b)
    ]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]]
    losses = [np.array([r["loss"] for r in run]) for run in rows]
    np.testing.assert_allclose(*losses, rtol=2e-4)
    states = [saved(d, "checkpoints", nursery.STEPS) for d in (a, b)]
    chex.assert_trees_all_close(*states, rtol=1e-2, atol=2e-4)


# -- stopped and resumed in this process -----------------------------------------------


@functools.cache
def points():
    return np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)


def model(seed=0, width=32):
    network = nets.MLPConfig(width=width, depth=1)((2,), jax.random.key(seed))
    return sdegen.Denoiser(network, sdegen.RectifiedFlow(), prediction.velocity, 1.0)


def fit(directory, x=None, **options):
    defaults = {
        "steps": 24,
        "batch_size": 16,
        "steps_per_call": 3,
        "save_every": 6,
        "progress": False,
    }
    return sdegen.fit(
        options.pop("denoiser", None) or model(),
        points() if x is None else x,
        directory=directory,
        **defaults | options,
    )


class Unplugged(Exception):
    """Power failure."""


def interrupted(directory, at=14, **options):
    """A run that ends by an exception at step `at` or the first call after it."""

    def unplug(step, _):
        if step >= at:
            raise Unplugged

    with contextlib.suppress(Unplugged):
        fit(directory, watch=unplug, watch_every=1, **options)
        raise AssertionError("the run was not interrupted")


def leaves(run):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(run.state)]


@functools.cache
def quiet():
    return fit(None)


def test_a_run_goes_on_where_it_was_saved(tmp_path):
    interrupted(tmp_path)
    rest = fit(tmp_path)
    assert rest.start == 12 and len(rest.losses) == 12  # the last multiple of 6
    chex.assert_trees_all_equal(leaves(rest), leaves(quiet()))
    np.testing.assert_array_equal(rest.losses, quiet().losses[12:])


def test_a_finished_run_is_read_and_nothing_is_trained(tmp_path):
    first = fit(tmp_path)
    again = fit(tmp_path)
    assert again.start == 24 and not len(again.losses)
    chex.assert_trees_all_equal(leaves(again), leaves(first))
    x = jnp.ones((3, 2))
    same = (run.model(jnp.asarray(0.5), x) for run in (again, first))
    chex.assert_trees_all_equal(*same)


@pytest.mark.parametrize(
    ("before", "after"), [("fsdp:8", "data:4"), ("data:4", None), (None, "fsdp:8")]
)
def test_a_run_goes_on_on_another_number_of_devices(tmp_path, before, after):
    specs = [None if s is None else mesh.make_mesh(s) for s in (before, after)]
    interrupted(tmp_path, mesh=specs[0])
    rest = fit(tmp_path, mesh=specs[1])
    assert rest.start == 12
    chex.assert_trees_all_close(leaves(rest), leaves(quiet()), rtol=1e-4, atol=1e-5)


def test_a_stream_is_taken_up_in_the_middle_of_an_epoch(tmp_path):
    stream = data.Arrays(points())
    interrupted(tmp_path, x=stream)
    rest = fit(tmp_path, x=stream)
    assert rest.start == 12
    # the same batches as from the array on the device, by a program of its own
    chex.assert_trees_all_close(leaves(rest), leaves(quiet()), rtol=1e-5, atol=1e-6)
    whole = fit(None, x=stream)
    chex.assert_trees_all_equal(leaves(rest), leaves(whole))


def damage(directory, step, how):
    """Cut off the largest file of a checkpoint, or change one byte in its middle."""
    place = Path(directory) / "checkpoints" / str(step)
    if how == "no meta":
        (place / "meta" / "metadata").unlink()
        return
    files = [p for p in (place / "state").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    largest.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "byte", "no meta"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, how):
    interrupted(tmp_path, at=20)
    damage(tmp_path, 18, how)
    with pytest.warns(UserWarning, match="checkpoint of step 18 is damaged"):
        rest = fit(tmp_path)
    assert rest.start == 12
    assert (tmp_path / "checkpoints" / "damaged-18").is_dir()
    chex.assert_trees_all_equal(leaves(rest), leaves(quiet()))


def test_damage_that_the_file_format_does_not_see_is_seen(tmp_path):
    """Another value saved under the fingerprint of the right one."""
    place = checkpoint.Checkpoints(tmp_path, identity={})
    array = jnp.arange(6.0)
    place.save(1, {"a": array})
    place.close()
    meta = tmp_path / "1" / "meta" / "metadata"
    text = json.loads(meta.read_text())
    text["fingerprint"]["a"] ^= 1
    meta.write_text(json.dumps(text))
    with pytest.raises(ValueError, match="the array a is not the one that was saved"):
        place.read(1, {"a": array})


def test_without_a_whole_checkpoint_nothing_is_overwritten(tmp_path):
    interrupted(tmp_path, at=8)
    damage(tmp_path, 6, "cut")
    with pytest.raises(ValueError, match="no checkpoint in .* can be read: step 6"):
        fit(tmp_path)
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").steps() == [6]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"steps": 30}, "steps"),
        ({"batch_size": 8}, "batch_size"),
        ({"x": np.zeros((100, 2), np.float32)}, "data.crc32"),
        ({"optimizer": sdegen.AdamW(learning_rate=2e-3)}, "optimizer.learning_rate"),
        ({"ema": [0.9]}, "ema"),
    ],
)
def test_the_directory_of_another_run_is_refused(finished, change, name):
    before = sorted(p.name for p in finished.rglob("*"))
    with pytest.raises(ValueError, match=f"holds another run: its {name} is"):
        fit(finished, **change)
    assert sorted(p.name for p in finished.rglob("*")) == before


def test_another_network_is_refused(finished):
    steps = checkpoint.Checkpoints(finished / "checkpoints").steps()
    with pytest.raises(ValueError, match="another state .* its .* is 'float32"):
        fit(finished, denoiser=model(width=16))
    assert checkpoint.Checkpoints(finished / "checkpoints").steps() == steps


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    with jax.enable_x64(False):
        fit(directory)
    return directory


def test_a_trained_model_is_loaded_without_its_data_and_optimiser(finished):
    run = fit(finished)
    other = model(seed=7)  # only its shapes count
    for average, own in ((0, run.state.averages[0]), (None, run.state.trained)):
        found = sdegen.load(finished, other, average=average)
        chex.assert_trees_all_equal(*map(jax.tree.leaves, (found.network, own)))
    assert sdegen.load(str(finished), other).sigma_data == other.sigma_data


def test_what_is_no_run_of_the_model_is_answered_with_a_sentence(finished, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    process = sdegen.Denoiser(model().network, sdegen.VP(), prediction.velocity, 1.0)
    for place, like, sentence in (
        (tmp_path / "none", model(), "there is no run at .*none"),
        (tmp_path / "empty", model(), "holds no run: it is empty"),
        (tmp_path / "file", model(), "is a file. A run is a directory"),
        (tmp_path, model(), "holds no run: it holds empty, file, and a run has"),
        (finished / "checkpoints", model(), "part of a run: give the run, .*finished"),
        (finished, model(width=8), r"another network: its network\S+ is \[32\]"),
        (finished, process, "another model: its model.path.class is 'RectifiedFlow'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            sdegen.load(place, like)
    with pytest.raises(ValueError, match="keeps 1 averages, got average=1"):
        sdegen.load(finished, model(), average=1)
    with pytest.raises(ValueError, match="holds no state that .*save has written"):
        checkpoint.restore(finished, model().network)
    with pytest.raises(ValueError, match="directory must be a folder"):
        fit(tmp_path / "file")


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fit("~/run", steps=3)
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
    assert sdegen.load("~/run", model()).network is not None
    with sdegen.Recorder("~/run") as recorder:
        recorder.row(step=1, loss=1.0)
    assert report.read("~/run")["rows"] == [{"step": 1, "loss": 1.0}]


def squares(factor):
    return lambda model, key, x0, cond=None, axis_name=None: jnp.mean(
        factor * (model.network - x0) ** 2
    )


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"optimizer": optax.adam(1e-1)}, "optimizer"),
        ({"loss": squares(2.0)}, "loss"),
        ({"augment": lambda key, x: x + 1}, "augment"),
        ({"x": data.Arrays(np.zeros((100, 2), np.float32))}, "data.stream"),
    ],
)
def test_a_stopped_run_does_not_go_on_with_another_function(tmp_path, change, name):
    def run(steps, **options):
        own = {"optimizer": optax.adam(1e-3), "loss": squares(1.0)}
        own |= {"augment": lambda key, x: x, "x": data.Arrays(points())}
        mean = Mean(jnp.zeros(2))
        return fit(tmp_path, steps=steps, denoiser=mean, **own | options)

    run(3)
    assert run(6).start == 3  # made anew, all is the same
    with pytest.raises(ValueError, match=f"holds another run: its {name}"):
        run(6, **change)


def test_what_cannot_be_compared_is_warned_of(tmp_path):
    held = iter([])

    def loss(model, key, x0, cond=None, *, axis_name=None):
        return jnp.mean((model.network - x0) ** 2) + len(held.__class__.__name__)

    options = {"steps": 3, "loss": loss, "denoiser": Mean(jnp.zeros(2))}
    with pytest.warns(UserWarning, match="objects of list_iterator .* looked into"):
        fit(tmp_path, **options)
    meta = checkpoint.Checkpoints(tmp_path / "checkpoints").metadata(3)
    assert meta["identity"]["unknown"] == ["list_iterator"]


class Mean(sdegen.AbstractModel):
    """A model whose program compiles at once."""

    network: jax.Array

    def loss(self, key, x0, cond=None, *, axis_name=None):
        return jnp.mean((self.network + jax.random.normal(key) - x0) ** 2)


def test_a_run_is_made_longer_where_its_rate_does_not_know_the_end(finished, tmp_path):
    mean, constant = Mean(jnp.zeros(2)), sdegen.AdamW(decay=False)
    options = {"denoiser": mean, "optimizer": constant}
    fit(tmp_path, steps=6, **options)
    longer = fit(tmp_path, steps=12, **options)
    assert longer.start == 6 and len(longer.losses) == 6
    whole = fit(None, steps=12, **options)
    chex.assert_trees_all_equal(leaves(longer), leaves(whole))
    calls = fit(tmp_path, steps=15, steps_per_call=15, **options)
    assert calls.start == 12 and int(calls.state.step) == 15
    with pytest.raises(ValueError, match="reached step 15, and .* ends at steps=12"):
        fit(tmp_path, steps=12, **options)
    with pytest.raises(ValueError, match="rate of this run falls to zero at its end"):
        fit(finished, steps=30)


def test_a_full_disk_is_a_sentence_and_the_last_checkpoint_stays(tmp_path):
    """No file may grow beyond a few kilobytes once step 12 is saved."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step, _):
        if step >= 15:
            while not (tmp_path / "checkpoints" / "12").is_dir():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))

    try:
        with pytest.raises(OSError, match="could not be written") as caught:
            fit(tmp_path, watch=fill, watch_every=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step 12 is the last" in str(caught.value)
    rest = fit(tmp_path)
    assert rest.start == 12
    chex.assert_trees_all_equal(leaves(rest), leaves(quiet()))


def test_sigterm_saves_at_the_call_and_says_so(tmp_path):
    def stop(step, _):
        if step == 15:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(sdegen.Preempted, match="step 18 of 24 is saved") as caught:
        fit(tmp_path, watch=stop, watch_every=1)
    assert caught.value.code == 75
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was
    rest = fit(tmp_path)
    assert rest.start == 18
    chex.assert_trees_all_equal(leaves(rest), leaves(quiet()))


# -- fingerprints ----------------------------------------------------------------------


def test_a_fingerprint_sees_every_bit_and_every_exchange():
    x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    bits = x.view(np.uint32)
    mark = np.asarray(checkpoint.fingerprint([x]))
    for place in [(0, 0), (3, 2), (6, 4)]:
        for bit in range(32):
            changed = bits.copy()
            changed[place] ^= np.uint32(1) << np.uint32(bit)
            other = checkpoint.fingerprint([changed.view(np.float32)])
            assert int(other[0]) != int(mark[0])
    order = x.copy()
    order[[0, 4]] = order[[4, 0]]
    assert int(checkpoint.fingerprint([order])[0]) != int(mark[0])


def test_a_fingerprint_is_the_same_on_any_mesh_and_for_any_type():
    kinds = [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_]
    x = np.random.default_rng(0).integers(0, 2, size=(64, 48))
    arrays = [jnp.asarray(x).astype(kind) for kind in kinds] + [jnp.float32(3)]
    one = np.asarray(checkpoint.fingerprint(arrays))
    shardings = mesh.parameter_sharding(arrays, mesh.make_mesh("fsdp:8"))
    split = mesh.place(arrays, shardings)
    assert split[0].addressable_shards[0].data.shape == (8, 48)
    np.testing.assert_array_equal(np.asarray(checkpoint.fingerprint(split)), one)


# -- what a step is made of ------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, "data"])
def test_a_batch_in_parts_is_the_whole_batch(axis):
    """The same draws of every sample, whatever the parts, and on a mesh."""
    network, key = model().network, jax.random.key(3)
    x0 = jnp.asarray(points()[:24])

    def found(accumulate, axis=None):
        def gradients(x0):
            options = {"axis_name": axis, "accumulate": accumulate}
            out = sdegen.training.gradients(network, model(), x0, None, key, **options)
            return out[:2] if axis is None else jax.lax.pmean(out[:2], axis)

        if axis is None:
            return jax.tree.leaves(jax.jit(gradients)(x0))
        places = {"in_specs": P(axis), "out_specs": P(), "check_vma": False}
        options = {"mesh": mesh.make_mesh("data:2"), **places}
        return jax.tree.leaves(jax.jit(jax.shard_map(gradients, **options))(x0))

    whole = found(1)
    chex.assert_trees_all_close(found(3, axis), whole, rtol=1e-4, atol=1e-6)


def test_a_loss_that_does_not_ask_for_its_samples_draws_in_every_part():
    def loss(model, key, x0, cond=None, *, axis_name=None):
        return jax.random.uniform(key) + 0 * model.network.last.bias[0].sum()

    key = jax.random.key(3)
    options = {"loss": loss, "accumulate": 3}
    value, _, _ = sdegen.training.gradients(
        model().network, model(), jnp.asarray(points()[:12]), None, key, **options
    )
    parts = [jax.random.uniform(jax.random.fold_in(key, j)) for j in range(3)]
    np.testing.assert_allclose(value, np.mean(parts), rtol=1e-6)


def test_bytes_become_minus_one_to_one_after_their_augmentation():
    """A loss that returns what it sees, under an augmentation that marks its key."""
    seen = []

    def loss(denoiser, key, x0, cond, axis_name=None):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x0)
        return jnp.mean(denoiser.network(jnp.zeros(len(x0)), x0, cond) ** 2)

    def mark(key, x):
        return jnp.where(jax.random.bernoulli(key), x, 255 - x)

    images = np.repeat(np.arange(8, dtype=np.uint8)[:, None, None, None], 2, 1)
    network = nets.MLPConfig(width=8, depth=1)((2, 1, 1), jax.random.key(0))
    runs = []
    for _ in range(2):
        seen.clear()
        sdegen.fit(
            sdegen.Denoiser(network, sdegen.VP()),
            images,
            steps=4,
            batch_size=8,
            steps_per_call=2,
            loss=loss,
            augment=mark,
            progress=False,
        )
        jax.effects_barrier()
        runs.append(np.sort(np.stack(seen), axis=0))
    x = (runs[0] + 1) * 127.5
    small, large = np.abs(x) < 7.5, np.abs(x - 255) < 7.5
    assert np.all(small | large) and small.any() and large.any()
    np.testing.assert_array_equal(*runs)  # a function of the seed


def test_dropout_acts_in_training_and_not_in_evaluation():
    network = nets.MLPConfig(width=32, depth=1, dropout=0.5)((2,), jax.random.key(0))
    network = jax.tree.map(lambda a: a + 0.1, network)
    dropped = sdegen.Denoiser(network, sdegen.VP(), prediction.v, 1.0)
    x, key = jnp.asarray(points()[:16]), jax.random.key(0)
    t = jnp.full(16, 0.5)
    keys = jax.random.split(key, 16)
    plain = dropped.predict(t, x)
    chex.assert_trees_all_equal(dropped.predict(t, x), plain)
    with_keys = dropped.predict(t, x, keys=keys)
    assert float(jnp.abs(with_keys - plain).max()) > 1e-3
    # sample i loses the same numbers in any batch
    part = dropped.predict(t[4:8], x[4:8], keys=keys[4:8])
    chex.assert_trees_all_close(part, with_keys[4:8], rtol=1e-5, atol=1e-6)
    assert float(sdegen.denoising_loss(dropped, key, x)) != pytest.approx(
        float(sdegen.denoising_loss(quietly(dropped), key, x)), rel=1e-4
    )


def quietly(denoiser):
    """The same, as a network that takes no key."""
    network = denoiser.network
    import dataclasses

    return dataclasses.replace(
        denoiser, network=jax.tree_util.Partial(lambda n, t, x, c: n(t, x, c), network)
    )


def test_several_averages_are_kept_at_once(tmp_path):
    averages = [0.9, ema.Power(0.05)]
    run = fit(tmp_path, ema=averages, snapshot_every=6)
    assert len(run.state.averages) == 2
    steps = checkpoint.Checkpoints(tmp_path / "averages", keep=None).steps()
    assert steps == [6, 12, 18, 24]
    last = saved(tmp_path, "averages", 24)
    expected = checkpoint.named(run.state.averages[1])
    chex.assert_trees_all_equal(
        {k[1:]: np.asarray(v) for k, v in last.items()},
        {k: np.asarray(v) for k, v in expected.items()},
    )
