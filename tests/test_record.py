"""What a run leaves behind: rows, configs and tables as text, states on disk."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdegen
from sdegen.nets import MLP, init
from sdegen.runs import checkpoint, writers
from sdegen.runs.recorder import describe, differing, table


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    betas: tuple[float, ...] = (0.9, 0.99)


@dataclasses.dataclass(frozen=True)
class Config:
    process: eqx.Module
    inner: Inner = Inner()
    name: str = "ring"
    quick: bool = False
    seed: int | None = None


def lines(directory):
    """The rows of a run, read strictly: NaN and Infinity are not JSON."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = (directory / "rows.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# -- the recorder ----------------------------------------------------------------------


def test_a_config_comes_back_from_its_file(tmp_path):
    config = Config(sdegen.VP(beta_max=15.0), Inner(0.25, (0.5,)), seed=3)
    sdegen.Recorder(tmp_path / "run", config).close()
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved.pop("class") == "Config"
    assert (saved["name"], saved["quick"], saved["seed"]) == ("ring", False, 3)
    inner = dict(saved["inner"])
    assert inner.pop("class") == "Inner"
    inner["betas"] = tuple(inner["betas"])
    assert Inner(**inner) == config.inner
    process = dict(saved["process"])
    cls, noise = process.pop("class"), process.pop("noise")
    assert noise == {"class": "Gaussian"}
    assert eqx.tree_equal(getattr(sdegen, cls)(**process), config.process)


def test_a_run_without_config_writes_none(tmp_path):
    with sdegen.Recorder(tmp_path) as recorder:
        recorder.row(step=1)
    assert not (tmp_path / "config.json").exists()


def test_arrays_and_modules_inside_a_config_become_plain_json():
    value = {
        "betas": jnp.array([0.25, 0.5]),
        "count": np.int32(4),
        "flag": np.bool_(True),
        "nested": [Inner(), {"f": table}],
        1: None,
    }
    plain = json.loads(json.dumps(describe(value)))
    assert plain == {
        "betas": [0.25, 0.5],
        "count": 4,
        "flag": True,
        "nested": [
            {"class": "Inner", "rate": 0.5, "betas": [0.9, 0.99]},
            {"f": "table"},
        ],
        "1": None,
    }


def test_rows_are_readable_before_the_file_is_closed(tmp_path):
    with sdegen.Recorder(tmp_path) as recorder:
        for step in range(3):
            recorder.row(step=step, loss=jnp.float32(0.5**step))
            assert lines(tmp_path)[step] == {"step": step, "loss": 0.5**step}
            assert len(lines(tmp_path)) == step + 1


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with sdegen.Recorder(tmp_path) as recorder:
        recorder.row(a=float("nan"), b=np.float32("inf"), c=jnp.array([1.0, jnp.nan]))
        recorder.row(a=-float("inf"), b=1, c=np.array(np.nan))
    assert lines(tmp_path) == [
        {"a": None, "b": None, "c": [1.0, None]},
        {"a": None, "b": 1, "c": None},
    ]


def test_float64_rows_keep_every_digit(tmp_path):
    value = 0.1 + 0.2
    with sdegen.Recorder(tmp_path) as recorder:
        recorder.row(value=value)
    assert lines(tmp_path) == [{"value": value}]


def test_rows_after_the_end_are_not_written(tmp_path):
    recorder = sdegen.Recorder(tmp_path)
    recorder.row(step=1)
    recorder.close()
    recorder.close()
    recorder.row(step=2)
    assert [row["step"] for row in lines(tmp_path)] == [1]


# -- going on --------------------------------------------------------------------------


def written(directory, rows, **options):
    with sdegen.Recorder(directory, **options) as recorder:
        for row in rows:
            recorder.row(**row)
            recorder.timing(step=row.get("step"), samples_per_second=2.0)


def test_a_new_run_starts_anew_and_a_resumed_one_keeps_its_rows(tmp_path):
    written(tmp_path, [{"step": 1}, {"step": 2}])
    written(tmp_path, [{"step": 3}], resume=True)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3]
    assert len((tmp_path / "timing.jsonl").read_text().splitlines()) == 3
    written(tmp_path, [{"step": 4}])
    assert [row["step"] for row in lines(tmp_path)] == [4]
    assert len((tmp_path / "timing.jsonl").read_text().splitlines()) == 1


def test_speed_is_written_apart(tmp_path):
    with sdegen.Recorder(tmp_path) as recorder:
        recorder.row(step=5, loss=0.5)
        recorder.timing(step=5, steps_per_second=np.float32(2.0))
    assert lines(tmp_path) == [{"step": 5, "loss": 0.5}]
    timing = (tmp_path / "timing.jsonl").read_text()
    assert json.loads(timing) == {"step": 5, "steps_per_second": 2.0}


def test_rows_after_a_step_and_rows_of_the_end_are_taken_back(tmp_path):
    rows = [{"step": n, "loss": 1 / n} for n in (10, 20, 30)] + [{"W2": 0.5}]
    written(tmp_path, rows)
    with sdegen.Recorder(tmp_path, resume=True) as recorder:
        recorder.rewind(20)
        assert lines(tmp_path) == rows[:2]
        recorder.row(**rows[2])
        assert lines(tmp_path) == rows[:3]
        recorder.rewind(0)
    assert lines(tmp_path) == []


@pytest.mark.parametrize("rewind", [True, False])
def test_a_half_written_line_is_taken_back(tmp_path, rewind):
    written(tmp_path, [{"step": 10}, {"step": 20}])
    for name in ("rows", "timing"):
        with open(tmp_path / f"{name}.jsonl", "a") as file:
            file.write('{"step": 30, "lo')
    with sdegen.Recorder(tmp_path, resume=True) as recorder:
        if rewind:
            recorder.rewind(30)
        recorder.row(step=30)
        recorder.timing(step=30)
    assert [row["step"] for row in lines(tmp_path)] == [10, 20, 30]
    timing = (tmp_path / "timing.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in timing] == [10, 20, 30]


def test_another_config_is_refused_by_the_name_of_its_field(tmp_path):
    config = {"inner": {"rate": 0.5, "out": "a"}, "out": "a", "mesh": ""}
    written(tmp_path, [{"step": 1}], config=config)
    before = (tmp_path / "config.json").read_text()
    for change, words in [
        ({"inner": {"rate": 0.25, "out": "a"}}, "its inner.rate is 0.5, this one's 0."),
        ({"inner": {"rate": 0.5, "out": "b"}}, "inner.out is 'a', this one's 'b'"),
        ({"name": "new"}, "its name is None, this one's 'new'"),
    ]:
        with pytest.raises(ValueError, match=words):
            sdegen.Recorder(tmp_path, config | change, resume=True)
    assert (tmp_path / "config.json").read_text() == before
    assert [row["step"] for row in lines(tmp_path)] == [1]
    moved = config | {"out": "b", "mesh": "fsdp"}
    written(tmp_path, [{"step": 2}], config=moved, resume=True)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]
    written(tmp_path, [], config=moved | {"inner": 3}, resume=True, free=["inner"])
    with pytest.raises(ValueError, match="its mesh is"):
        written(tmp_path, [], config=config | {"inner": 3}, resume=True, free=["out"])
    # a new run may have any config
    written(tmp_path, [{"step": 9}], config={"other": 1})


def test_a_class_and_its_numbers_tell_configs_apart():
    a, b = (describe(Config(p)) for p in (sdegen.VP(), sdegen.VE()))
    assert differing(a, a) == ""
    assert "its process.class is 'VP', this one's 'VE'" in differing(a, b)
    c = describe(Config(sdegen.VP(beta_max=15.0)))
    assert "its process.beta_max is 20.0, this one's 15.0" in differing(a, c)


DESCRIBED = """
import functools, json, sys
import equinox as eqx, jax, optax
import sdegen
from sdegen import times
from sdegen.runs.recorder import describe
from sdegen.losses.weight import uniform


class Mine:
    def __call__(self, x):
        return x


value = {
    "partial": functools.partial(sdegen.denoising_loss, weight=Mine()),
    "module": eqx.Partial(sdegen.denoising_loss, times=times.LogNormal()),
    "tree": jax.tree_util.Partial(uniform, 3, k={"a": Mine()}),
    "object": [Mine(), Mine, Mine().__call__, lambda x: x, object()],
    "optax": optax.adam(1e-3),
    "set": {"b", "a", "c", "d", "e"},
    "key": jax.random.key(7),
    "jitted": jax.jit(uniform),
}
sys.stdout.write(json.dumps(describe(value)))
"""


def test_two_processes_describe_the_same(tmp_path):
    """No address, no order of a set: what a run is must not depend on its process."""
    said = []
    for seed in ("1", "2"):
        process = subprocess.run(
            [sys.executable, "-c", DESCRIBED],
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin"},
            cwd=Path(__file__).parent.parent,
        )
        assert process.returncode == 0, process.stderr[-2000:]
        said.append(process.stdout)
    assert said[0] == said[1]
    assert not re.search("0x[0-9a-f]{6}", said[0])
    plain = json.loads(said[0])
    assert plain["partial"] == ["denoising_loss", [], {"weight": "Mine"}]
    assert plain["module"]["keywords"]["times"]["class"] == "LogNormal"
    assert plain["set"] == ["a", "b", "c", "d", "e"]


# -- writers ---------------------------------------------------------------------------


class Listener:
    """A writer that remembers."""

    def __init__(self):
        self.heard = []

    def scalars(self, step, values):
        self.heard.append((step, values))

    def image(self, step, name, image):
        self.heard.append((step, name, image.shape))

    def close(self):
        self.heard.append("close")


def test_writers_get_the_numbers_of_rows_that_have_a_step(tmp_path):
    one, two = Listener(), Listener()
    with sdegen.Recorder(tmp_path, writers=[one, two]) as recorder:
        recorder.row(step=jnp.array(3), loss=jnp.float32(0.5), name="x", n=2)
        recorder.row(step=4, loss=float("nan"), grad_norm=1.0)
        recorder.timing(step=4, steps_per_second=8.0)
        recorder.row(W2=0.5)  # belongs to no step
        recorder.image(4, "samples", np.zeros((2, 3, 3), np.uint8))
    expected = [
        (3, {"loss": 0.5, "n": 2}),
        (4, {"grad_norm": 1.0}),
        (4, {"steps_per_second": 8.0}),
        (4, "samples", (2, 3, 3)),
        "close",
    ]
    assert one.heard == two.heard == expected
    assert all(type(n) is int for n, *_ in one.heard[:-1])


def test_tensorboard_files_hold_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    writer = writers.KINDS["tensorboard"](tmp_path, Config(sdegen.VP()))
    with sdegen.Recorder(tmp_path, writers=[writer]) as recorder:
        recorder.row(step=3, loss=0.25)
        recorder.image(3, "samples", np.full((4, 5, 3), 128, np.uint8))
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, at, found = file.read_bytes(), 0, {}
    while at < len(content):  # length, its checksum, the event, its checksum
        length = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + length])
        at += length + 16
        for value in event.summary.value:
            found[value.tag] = event.step, value
    assert found["loss"][0] == found["samples"][0] == 3
    assert found["loss"][1].simple_value == 0.25
    image = found["samples"][1].image
    assert (image.height, image.width) == (4, 5)
    assert image.encoded_image_string.startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", list(writers.KINDS))
def test_a_missing_package_is_a_sentence(tmp_path, monkeypatch, kind):
    def missing(name, *_):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match="not installed: pip install") as caught:
        writers.KINDS[kind](tmp_path)
    assert kind in str(caught.value).lower()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_trackers_get_the_config_as_plain_json_and_every_number(
    tmp_path, monkeypatch, kind
):
    """Against a module with their interface: neither is a dependency of the tests."""

    class Module:
        calls = []
        Image = staticmethod(lambda image: ("image", image.shape))

        def __getattr__(self, name):
            return lambda *args, **kwargs: self.calls.append((name, args, kwargs))

    module = Module()
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    writer = writers.KINDS[kind](tmp_path / "run", Config(sdegen.VP()))
    with sdegen.Recorder(tmp_path / "run", writers=[writer]) as recorder:
        recorder.row(step=3, loss=0.25)
        recorder.image(3, "samples", np.zeros((4, 5, 3), np.uint8))
    (first, _, options), *rest = module.calls
    assert first == "init" and options["name"] == "run"
    assert json.loads(json.dumps(options["config"]))["process"]["class"] == "VP"
    assert rest == [
        ("log", ({"loss": 0.25},), {"step": 3}),
        ("log", ({"samples": ("image", (4, 5, 3))},), {"step": 3}),
        ("finish", (), {}),
    ]


# -- tables ----------------------------------------------------------------------------

ROWS = [
    {"process": "VP", "steps": 8, "error": 0.123456},
    {"process": "RectifiedFlow", "steps": 1024, "error": 0.0000123},
    {"process": "EDM", "steps": 64, "error": 1234.5},
]


def test_a_table_has_a_header_a_rule_and_one_line_per_row():
    header, rule, *body = table(ROWS).splitlines()
    assert header.split() == ["process", "steps", "error"]
    assert set(rule) == {"-"}
    assert len(rule) == max(map(len, [header, *body]))
    assert [line.split()[0] for line in body] == ["VP", "RectifiedFlow", "EDM"]


def test_numbers_are_aligned_to_the_right_and_words_to_the_left():
    header, _, *body = table(ROWS).splitlines()
    everything = [header, *body]
    for word in range(3):
        starts = {line.index(line.split()[word]) for line in everything}
        ends = {
            line.index(line.split()[word]) + len(line.split()[word])
            for line in everything
        }
        assert len(starts if word == 0 else ends) == 1
        assert len(ends if word == 0 else starts) > 1  # or the test would see nothing


def test_a_table_says_the_numbers_to_three_digits():
    cells = [line.split()[2] for line in table(ROWS).splitlines()[2:]]
    assert cells[:2] == ["0.123", "1.23e-05"]
    assert float(cells[2]) == 1234.5
    assert table([{"x": 0.123456}], digits=5).splitlines()[-1] == "0.12346"


# -- checkpoints -----------------------------------------------------------------------

OPTIMISER = optax.adam(1e-3)


def state(width=8, depth=1, seed=0):
    network = init(
        lambda rngs: MLP((2,), width=width, depth=depth, rngs=rngs),
        jax.random.key(seed),
    )
    return sdegen.init_state(network, OPTIMISER)


def trained():
    """A state in which every array differs from its start."""
    leaves, tree = jax.tree.flatten(state())
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        tree,
        [
            x + 7
            if jnp.issubdtype(x.dtype, jnp.integer)
            # full mantissas, so that nothing is lost by luck
            else x + jax.random.normal(k, x.shape, x.dtype)
            for x, k in zip(leaves, keys, strict=True)
        ],
    )


def test_a_training_state_comes_back_bit_for_bit(tmp_path, float32):
    before = trained()
    where = checkpoint.save(tmp_path / "state", before)
    assert where.is_dir()
    after = checkpoint.restore(tmp_path / "state", state(seed=5))
    assert eqx.tree_equal(before, after, typematch=True)
    x = jnp.ones((3, 2))
    assert jnp.array_equal(
        before.averages[0](jnp.ones(()), x), after.averages[0](jnp.ones(()), x)
    )


@pytest.mark.parametrize("other", [{"depth": 2}, {"width": 16}])
def test_another_network_is_refused(tmp_path, float32, other):
    checkpoint.save(tmp_path / "state", state())
    with pytest.raises(ValueError, match="another state"):
        checkpoint.restore(tmp_path / "state", state(**other))


def test_another_optimiser_is_refused_by_name(tmp_path, float32):
    checkpoint.save(tmp_path / "state", state())
    network = state().trained
    with pytest.raises(ValueError, match="opt_state.*the optimiser that were saved"):
        like = sdegen.init_state(network, optax.sgd(0.1))
        checkpoint.restore(tmp_path / "state", like)


def test_an_existing_directory_is_kept(tmp_path, float32):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "note").write_text("mine")
    with pytest.raises(FileExistsError, match="nothing was written"):
        checkpoint.save(tmp_path / "state", {"a": jnp.zeros(2)})
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["note"]


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere"):
        checkpoint.restore(tmp_path / "nowhere", {"a": jnp.zeros(2)})
