"""Every script and every block of the README runs, as a user would run it."""

import ast
import dataclasses
import importlib.util
import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Float

import sdegen
from sdegen import cli
from sdegen.sweeps import command

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(p.stem for p in (ROOT / "experiments").glob("*.py"))
PICTURES = {
    "quickstart": ["samples.png", "flow.png", "loss.png"],
    "processes": ["samples.png", "loss.png"],
    "custom_sde": ["samples.png"],
    "likelihood": ["plane.png", "digits.png"],
    "nonlinear": ["well.png"],
    "images": ["samples/00000020.png"],
    "reflow": ["steps.png"],
    "two_dim": ["paths.png"],
    "conditional": ["guidance.png", "inpainting.png"],
    "udm": ["restored.png", "drawn.png", "heat.png"],
}


ENVIRONMENT = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "COLUMNS": "100"}
ENVIRONMENT |= {k: v for k, v in os.environ.items() if "_CACHE_" in k}
QUICKLY = "JAX_DISABLE_MOST_OPTIMIZATIONS"


def run(*arguments):
    """A command line in a process of its own: exactly what a user starts."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=600,
    )


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    """`run` by a process that has imported the libraries, compiled like the tests."""
    stage = subprocess.Popen(
        [sys.executable, Path(__file__).parent / "stage.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT | {QUICKLY: os.environ.get(QUICKLY, "0")},
        start_new_session=True,
    )

    def one(*words):
        place = tmp_path_factory.mktemp("said")
        out, err = (str(place / name) for name in ("out", "err"))
        order = {"words": [str(word) for word in words], "out": out, "err": err}
        print(json.dumps(order), file=stage.stdin, flush=True)
        assert select.select([stage.stdout], [], [], 600)[0], "ten minutes are over"
        code = int(stage.stdout.readline())
        said, erred = Path(out).read_text(), Path(err).read_text()
        return SimpleNamespace(returncode=code, stdout=said, stderr=erred)

    yield one
    os.killpg(stage.pid, signal.SIGKILL)
    stage.wait()


def load(name, folder="experiments"):
    """A script as a module, without running it."""
    path = ROOT / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_runs_and_leaves_its_pictures(name, tmp_path, play):
    out = ["--out", tmp_path] if name in PICTURES else []
    # one script has a start and the compiler's defaults of its own, as for a user
    start = run if name == "quickstart" else play
    done = start(f"experiments/{name}.py", "--quick", *out)
    assert done.returncode == 0, done.stderr[-2000:]
    for picture in PICTURES.get(name, []):
        from matplotlib.image import imread

        pixels = imread(tmp_path / picture)
        assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.05
    if name == "quickstart":
        lines = (tmp_path / "rows.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        rows = {row["sampler"]: row for row in rows if "sampler" in row}
        # published with the figures to beat: a clipped Gaussian fit, and the floor
        assert abs(rows["Gaussian"]["W2"] - 3.51) < 0.05
        assert abs(rows["Gaussian"]["MMD2"] - 0.075) < 0.005
        assert abs(rows["real half"]["W2"] - 2.63) < 0.1
        assert rows["flow"]["evaluations"] == 4
        assert "reverse SDE" in done.stdout


@pytest.mark.slow
def test_a_sweep_runs_by_the_command(tmp_path, play):
    words = ["sweep", "experiments/sweeps/rates.py", "--quick", "--out", str(tmp_path)]
    done = play("-c", f"from sdegen.__main__ import main; main({words!r})")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 trials: 8 ok" in done.stdout
    for file in ("results.csv", "summary.csv", "ledger.txt", "sweep.png"):
        assert (tmp_path / file).stat().st_size > 0


def test_every_sweep_file_lists_its_trials_and_names_fields_that_exist(capsys):
    for file in (ROOT / "experiments" / "sweeps").glob("*.py"):
        if file.stem != "denoising":
            plan = command.load(file)
            for name in {name for part in plan.axes.parts for name in part} - {"seed"}:
                sdegen.sweeps.override(plan.config, {name: 0.5})
            command.execute(command.Config(file, dry_run=True))
            assert " programs" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*SCRIPTS, "sweep"])
def test_help_names_every_field(name, capsys):
    config = command.Config if name == "sweep" else load(name).Config
    with pytest.raises(SystemExit) as ended:
        cli.parse(config, ["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for field in config.__dataclass_fields__:
        assert field.replace("_", "-") in text or f"{field} options" in text, field


def test_a_help_text_is_wrapped_and_its_commands_and_tables_are_not_broken():
    text = """Prose that is longer than the line, and goes on.

        python experiments/long.py --steps 400000
        1.0   2.0   3.0   4.0   5.0   6.0   7.0

    - an item that is longer than the line is
      one item."""
    assert cli.wrapped(text, 40).splitlines() == [
        " Prose that is longer than the line, and",
        " goes on.",
        "",
        "     python experiments/long.py \\",
        "         --steps 400000",
        "     1.0   2.0   3.0   4.0   5.0   6.0   7.0",
        "",
        " - an item that is longer than the line",
        "   is one item.",
    ]
    for file in (ROOT / "experiments").glob("*.py"):
        doc = ast.get_docstring(ast.parse(file.read_text())) or ""
        assert max(map(len, cli.wrapped(doc, 80).splitlines())) <= 80, file.name


def test_any_field_and_any_component_is_set_from_the_shell():
    words = "process:vp --process.beta-max 15 optimizer:lion --optimizer.clip 2"
    config = cli.parse(load("quickstart").Config, [*words.split(), "--steps", "7"])
    assert type(config.process).__name__ == "VP"
    assert float(config.process.beta_max) == 15 and config.steps == 7
    assert type(config.optimizer).__name__ == "Lion"
    assert float(config.optimizer.clip) == 2
    assert np.isclose(float(config.process.beta_min), 0.1)  # nothing else moved
    assert config.batch_size == cli.parse(load("quickstart").Config, []).batch_size


def test_a_mistyped_field_is_answered_with_the_nearest_name(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.parse(load("quickstart").Config, ["--batch-sise", "3"])
    assert ended.value.code != 0
    assert "--batch-size" in capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class Levels:
    levels: Float[jax.Array, " k"] = dataclasses.field(
        default_factory=lambda: jnp.ones(1)
    )


def test_an_array_is_set_from_the_shell_with_all_its_numbers():
    assert [*cli.parse(Levels, ["--levels", "1", "2.5", "4"]).levels] == [1, 2.5, 4]


def test_an_error_of_the_library_in_a_script_is_one_sentence():
    with pytest.raises(SystemExit, match="error: VP needs 0 <= t_min < t_max"):
        cli.run(lambda config: sdegen.VP(t_min=2.0), Levels, [])


def test_bad_input_ends_with_one_sentence_and_no_traceback(tmp_path):
    script = "experiments/quickstart.py"
    done = run(script, "process:vp", "--process.t-min", "2", "--out", tmp_path)
    assert done.returncode != 0
    assert "VP needs 0 <= t_min < t_max" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "page, last",
    [
        ("README.md", "(1000, 2) 32 True"),
        ("docs/adding-a-process.md", "(8, 8, 1)"),
        ("docs/conditional.md", "(100, 2)"),
        ("docs/couplings.md", "2 "),
        ("docs/training.md", "steps 0 to 20"),
    ],
)
def test_every_block_of_a_page_runs(page, last, tmp_path, play):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    code = re.sub(r"steps=(500|2000)\b", "steps=20", "\n".join(blocks))
    # the parts that simulate are tested with the check itself
    short = 'check(langevin, parts=("finite", "moments"))'
    code = code.replace("check(langevin)", short)
    code = code.replace("runs/small", str(tmp_path / "small"))
    done = play("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert last in done.stdout


def test_every_script_of_the_readme_exists():
    named = re.findall(r"experiments/(\w+)\.py", (ROOT / "README.md").read_text())
    assert set(named) == set(SCRIPTS)


def test_the_picture_of_the_floors_is_that_of_the_imports():
    drawn, kept = load("floors", "docs").draw(), ROOT / "docs/floors.svg"
    assert drawn == kept.read_text(), "run: python docs/floors.py"
