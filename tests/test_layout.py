"""The layout of the package: floors of imports, sizes, docstrings, exports.

Everything is read from the source with `ast`, so a new file is checked as soon as it
exists; a file that is on no floor fails with a sentence.
"""

import ast
import graphlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import mutants

import sdegen
import sdegen.processes

PACKAGE = Path(sdegen.__file__).parent
TEXTS = {
    path.relative_to(PACKAGE).as_posix(): path.read_text()
    for path in sorted(PACKAGE.rglob("*.py"))
}
FILES = {file: ast.parse(text) for file, text in TEXTS.items()}
FLOORS = {
    0: ["typing.py", "runs/", "_compat.py"],
    1: ["processes/", "metrics/", "mesh.py"],
    2: ["solvers/", "nets/"],
    3: ["losses/"],
    4: ["models/"],
    5: ["data/", "likelihood/", "sampling/"],
    6: ["corruption/", "guidance/", "training/"],
    7: ["checks/", "cli.py"],
    8: ["sweeps/"],
    9: ["__init__.py", "__main__.py"],
}
"""A folder stands for all its files. The roof is the list of exports, the command."""
CORE = {"typing.py", "mesh.py", "processes", "solvers", "losses", "models"} | {
    "likelihood",
    "sampling",
    "guidance",
    "checks",
}
"""The mathematics: no training framework."""
FRAMEWORKS = {"flax", "optax", "orbax", "grain"}
HEAVY = "scipy sklearn matplotlib orbax optuna ot tyro tqdm grain PIL tensorstore"
"""Packages that are imported where they are used, not with the package."""


def floor(file):
    for number, places in FLOORS.items():
        if any(file == p or (p.endswith("/") and file.startswith(p)) for p in places):
            return number
    raise AssertionError(
        f"sdegen/{file} is on no floor: put it into FLOORS of tests/test_layout.py and "
        "into the layout table of docs/architecture.md, or into an existing folder."
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


def test_every_file_has_a_floor_and_imports_from_no_higher_one():
    high = {
        f"sdegen/{file} on floor {floor(file)}": other
        for file in FILES
        for other in imported(file)
        if floor(other) > floor(file)
    }
    assert not high, f"imports from a higher floor: {high}"


def test_the_top_has_no_files_but_those_of_the_floors():
    named = {place for places in FLOORS.values() for place in places}
    top = {f"{p.name}/" if p.is_dir() else p.name for p in PACKAGE.iterdir()}
    assert top - {"__pycache__/", "py.typed"} == named


def test_no_imports_go_round_in_a_circle():
    graph = {file: imported(file) for file in FILES}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert len(order) == len(FILES)
    assert order.index("processes/path.py") < order.index("processes/sde.py")
    assert order.index("processes/prediction.py") < order.index("losses/weight.py")


def test_the_reader_of_imports_sees_what_it_should():
    # Guards the tests above against a reader that finds nothing.
    sde = {"path.py", "noise.py", "brownian.py"}
    assert {f"processes/{f}" for f in sde} <= imported("processes/sde.py")
    assert {"processes/prediction.py", "typing.py"} <= imported("losses/weight.py")
    assert {"data/batches.py", "mesh.py"} <= imported("training/feed.py")
    assert {"processes/noise.py", "processes/sde.py"} <= imported("processes/vp.py")
    assert "processes/__init__.py" in imported("__init__.py")


def test_the_core_knows_no_training_framework():
    knows = {
        file: found
        for file in FILES
        if file.split("/")[0] in CORE
        and (found := {n.split(".")[0] for n in modules(file)} & FRAMEWORKS)
    }
    assert not knows


def test_no_file_is_long_and_every_file_opens_with_a_docstring():
    lines = {file: len(text.splitlines()) for file, text in TEXTS.items()}
    assert not {file: n for file, n in lines.items() if n > 400}
    assert not [file for file, tree in FILES.items() if not ast.get_docstring(tree)]


def functions():
    """(file, name, node) of every function; methods as Class.method."""
    for file, tree in FILES.items():
        owner = {
            id(inner): node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
            for inner in node.body
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                outer = owner.get(id(node))
                yield file, f"{outer}.{node.name}" if outer else node.name, node


def test_no_function_is_long_and_no_public_one_has_many_parameters():
    long, wide = {}, {}
    for file, name, node in functions():
        if (n := node.end_lineno - node.lineno + 1) > 80:
            long[f"{file} {name}"] = n
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        n = sum(argument.arg not in ("self", "cls") for argument in given)
        if n > 12 and not name.rpartition(".")[2].startswith("_"):
            wide[f"{file} {name}"] = n
    assert not long, f"functions of more than 80 lines: {long}"
    assert not wide, f"public functions of more than 12 parameters: {wide}"


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
    names = "__getattr__ = _renamed(__name__)"
    for file in FILES:
        if not file.endswith("__init__.py"):
            continue
        module = __import__(
            ".".join(["sdegen", *Path(file).parent.parts]), fromlist=["_"]
        )
        assert not hasattr(module, "__all__")
        for node in FILES[file].body[1:]:
            line = ast.unparse(node)
            if line == names or line.endswith("_compat import renamed as _renamed"):
                continue
            assert isinstance(node, ast.ImportFrom), f"{file} does more than export"
            assert [a.name == a.asname for a in node.names] == [True], line
            assert hasattr(module, node.names[0].name)


def test_no_function_hides_a_room_or_a_file_of_the_top():
    rooms = {place.strip("/") for places in FLOORS.values() for place in places}
    for room in rooms:
        name = room.removesuffix(".py")
        if not name.startswith("_"):
            assert inspect.ismodule(getattr(sdegen, name)), name


def test_every_process_is_exported_at_the_top():
    kinds = sdegen.AbstractPath | sdegen.AbstractSDE | sdegen.AbstractInterpolant
    found = 0
    for file in FILES:
        if not file.startswith("processes/"):
            continue
        module = sys.modules[
            f"sdegen.{file[:-3].replace('/', '.')}".removesuffix(".__init__")
        ]
        for name, cls in vars(module).items():
            own = inspect.isclass(cls) and cls.__module__ == module.__name__
            if own and issubclass(cls, kinds):
                if not name.startswith(("_", "Abstract")):
                    assert getattr(sdegen, name) is cls
                    found += 1
    assert found > 15


def test_every_mutant_fits_the_package_and_names_tests_that_exist():
    names = [mutant.name for mutant in mutants.MUTANTS]
    assert len(set(names)) == len(names) >= 45
    for mutant in mutants.MUTANTS:
        assert ast.dump(ast.parse(mutant.changed(TEXTS[mutant.file]))) != ast.dump(
            FILES[mutant.file]
        ), mutant.name
        selected = [word for word in mutant.words if word.startswith("tests/")]
        assert selected, f"{mutant.name} names no test"
        for file, _, name in (word.partition("::") for word in selected):
            text = (mutants.ROOT / file).read_text()
            assert f"def {name.partition('[')[0]}(" in text or not name, mutant.name
    rooms = {place.strip("/") for places in FLOORS.values() for place in places}
    rooms -= {"typing.py", "_compat.py", "__init__.py", "__main__.py"}
    assert {mutant.file.split("/")[0] for mutant in mutants.MUTANTS} == rooms


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


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, sdegen; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.split())
    assert "sdegen" in found and not found & set(HEAVY.split())
