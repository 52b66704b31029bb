"""The plan of the house: ranks of imports, sizes, docstrings, exports.

Everything is read from the source with `ast`, so a new file is checked as soon as it
exists; a file that is in no rank fails with a sentence.
"""

import ast
import graphlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sdegen
import sdegen.processes

PACKAGE = Path(sdegen.__file__).parent
FILES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
}
RANKS = {
    0: ["typing.py"],
    1: ["base.py", "basis.py", "brownian.py", "radial.py", "sinkhorn.py"],
    2: ["path.py", "sde.py", "reverse.py", "block.py", "generator.py", "track.py"],
    3: ["processes/", "prediction.py", "coupling/", "times.py", "weight.py"],
    4: ["denoiser.py"],
    5: ["loss.py", "guidance/", "solvers/", "mesh.py", "angle.py", "bridge.py"]
    + ["augmented.py", "velocity.py", "vdm.py", "udm/"],
    6: ["generate.py", "sample.py", "simulate.py", "likelihood/", "score_error.py"]
    + ["check/", "nonlinear/", "transition.py", "particles.py", "inverse/"],
    7: ["nets/", "data/", "metrics/", "checkpoint.py", "record.py", "pictures.py"]
    + ["optimizer.py", "learn.py", "average.py", "speed.py", "writers.py"],
    8: ["train/", "posthoc_ema.py", "report.py", "tilt.py"],
    9: ["cli.py", "reflow.py", "sweep/"],
    10: ["__init__.py"],
}
"""A folder stands for all its files. The roof is the list of exports."""
CORE = 6
"""Up to this rank the library is mathematics: no training framework."""


def rank(file):
    for number, places in RANKS.items():
        if any(file == p or (p.endswith("/") and file.startswith(p)) for p in places):
            return number
    raise AssertionError(
        f"sdegen/{file} is in no rank: put it into RANKS of tests/test_layout.py and "
        "into the layout table of the design, or into an existing folder."
    )


def modules(file):
    """The absolute names of all that `file` imports, at any depth of its code."""
    package = ["sdegen", *Path(file).parent.parts]
    for node in ast.walk(FILES[file]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def source(name):
    """The file of this package that an import of `name` reads, or None."""
    parts = name.split(".")
    if parts[0] != "sdegen":
        return None
    for end in (len(parts), len(parts) - 1):  # the last part may be a name in a file
        stem = "/".join(parts[1:end])
        for file in (f"{stem}.py", f"{stem}/__init__.py" if stem else "__init__.py"):
            if file in FILES:
                return file
    raise AssertionError(f"no file of the package holds {name}")


def imported(file):
    return {found for name in modules(file) if (found := source(name)) is not None}


def in_file(*kinds):
    return ((file, node) for file in FILES for node in walk(file, *kinds))


def walk(file, *kinds):
    return (node for node in ast.walk(FILES[file]) if isinstance(node, kinds))


@pytest.mark.parametrize("file", FILES)
def test_every_file_has_a_rank_and_imports_from_no_higher_one(file):
    high = {other: rank(other) for other in imported(file) if rank(other) > rank(file)}
    assert not high, f"sdegen/{file} has rank {rank(file)} and imports from {high}"


def test_no_imports_go_round_in_a_circle():
    graph = {file: imported(file) for file in FILES}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert len(order) == len(FILES)
    assert order.index("path.py") < order.index("sde.py")
    assert order.index("prediction.py") < order.index("weight.py")


def test_the_reader_of_imports_sees_what_it_should():
    # Guards the tests above against a reader that finds nothing.
    assert {"path.py", "base.py", "brownian.py", "typing.py"} <= imported("sde.py")
    assert {"prediction.py", "sde.py"} <= imported("weight.py")
    assert {"data/batches.py", "mesh.py"} <= imported("train/feed.py")
    assert {"base.py", "sde.py"} <= imported("processes/vp.py")
    assert "processes/__init__.py" in imported("__init__.py")


@pytest.mark.parametrize("file", [f for f in FILES if rank(f) <= CORE])
def test_the_core_knows_no_training_framework(file):
    tops = {name.split(".")[0] for name in modules(file)}
    assert not tops & {"flax", "optax", "orbax", "grain"}


@pytest.mark.parametrize("file", FILES)
def test_no_file_is_long(file):
    assert len((PACKAGE / file).read_text().splitlines()) <= 400


@pytest.mark.parametrize("file", FILES)
def test_every_file_opens_with_a_docstring(file):
    assert ast.get_docstring(FILES[file])


def process_classes():
    return {
        name
        for name, cls in vars(sdegen).items()
        if inspect.isclass(cls)
        and issubclass(cls, sdegen.AbstractPath | sdegen.AbstractSDE)
        and not inspect.isabstract(cls)
    }


def test_nobody_asks_which_process_it_is():
    """No isinstance, match or comparison of type against a final process."""
    names = process_classes()
    assert {"VP", "EDM", "LinearSDE", "CustomSDE"} <= names
    found = []
    for file, call in in_file(ast.Call):
        if getattr(call.func, "id", "") in ("isinstance", "issubclass"):
            found += [(file, word) for word in words(call.args[1])]
    for file, pattern in in_file(ast.MatchClass):
        found += [(file, word) for word in words(pattern.cls)]
    for file, compare in in_file(ast.Compare):
        found += [(file, word) for side in compare.comparators for word in words(side)]
    assert not [(file, word) for file, word in found if word in names]


def words(node):
    return {
        n.id if isinstance(n, ast.Name) else n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Name | ast.Attribute)
    }


def test_exports_are_one_line_each_and_exist():
    for file in FILES:
        if not file.endswith("__init__.py"):
            continue
        module = __import__(
            ".".join(["sdegen", *Path(file).parent.parts]), fromlist=["_"]
        )
        assert not hasattr(module, "__all__")
        for node in FILES[file].body[1:]:
            assert isinstance(node, ast.ImportFrom), f"{file} does more than export"
            assert [a.name == a.asname for a in node.names] == [True], ast.unparse(node)
            assert hasattr(module, node.names[0].name)


def test_every_process_is_exported_at_the_top():
    for file in FILES:
        if not file.startswith("processes/"):
            continue
        for cls in walk(file, ast.ClassDef):
            if not cls.name.startswith(("_", "Abstract")):
                assert getattr(sdegen, cls.name) is getattr(sdegen.processes, cls.name)


def test_importing_the_package_starts_no_backend():
    # With a platform that does not exist, whatever starts a backend fails.
    code = (
        "import sdegen, sdegen.nets, sdegen.data, sdegen.metrics, sdegen.cli, jax\n"
        "try: jax.devices()\n"
        "except RuntimeError: print('asleep')\n"
    )
    env = os.environ | {"JAX_PLATFORMS": "none_such"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "asleep"
