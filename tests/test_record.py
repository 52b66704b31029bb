"""What a run leaves behind: rows, configs and tables as text, states on disk."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdegen
from sdegen import checkpoint
from sdegen.nets import MLP, init
from sdegen.record import describe, table


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
    cls, base = process.pop("class"), process.pop("base")
    assert base == {"class": "Gaussian"}
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
    assert jnp.array_equal(before.averages[0](jnp.ones(()), x), after.averages[0](jnp.ones(()), x))


@pytest.mark.parametrize("other", [{"depth": 2}, {"width": 16}])
def test_another_network_is_refused(tmp_path, float32, other):
    checkpoint.save(tmp_path / "state", state())
    with pytest.raises(ValueError, match="another state"):
        checkpoint.restore(tmp_path / "state", state(**other))


def test_another_optimiser_is_refused_by_name(tmp_path, float32):
    checkpoint.save(tmp_path / "state", state())
    network = state().network
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
