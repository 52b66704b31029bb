"""The check of a process from the shell: `sdegen check module:Name`."""

import argparse
import difflib
import importlib
import inspect
import sys
import traceback
from pathlib import Path
from typing import Any

from ..cli import import_file
from .run import KINDS, check

_DESCRIPTION = """\
Is this process what it says it is? Compares alpha and sigma with drift and
diffusion, tests the distribution of x_t, runs known data back through the flow
and the reverse SDE, and tests the distribution at t_max. A few seconds each."""
_EPILOG = """\
examples:
  sdegen check sdegen:VP
  sdegen check my_package.processes:MySDE my_file.py:make_process
exit status: 0 all is well, 1 a check failed, 2 a mistake in the command."""
_PROCESSES = (
    "a class that needs no arguments, an object, or a function that returns one; for "
    "module also a path/to/file.py"
)
_SHAPE = "shape of one sample (default: 2, or 1 for an SDE without alpha, sigma)"
_SAMPLES = "samples of the random checks (default 8000)"


def main(argv: list[str] | None = None) -> int:
    """The command `sdegen check`; returns the exit status."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "sdegen check", None, _DESCRIPTION, _EPILOG, formatter_class=layout
    )
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("processes", nargs="+", metavar="module:Name", help=_PROCESSES)
    parser.add_argument("--shape", nargs="+", **number, help=_SHAPE)
    parser.add_argument("--seed", default=0, **number, help="default 0")
    parser.add_argument("--samples", default=8000, **number, help=_SAMPLES)
    options = vars(parser.parse_args(argv))
    try:
        # All names first: a slip in the last should not wait for the first check.
        processes = [load(name) for name in options.pop("processes")]
        ok = True
        for i, process in enumerate(processes):
            report = check(process, **options)
            print("\n" * (i > 0) + str(report), flush=True)
            ok = ok and report.ok
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if ok else 1


def load(name: str) -> Any:
    """The process that `module:Name` or `path/to/file.py:Name` means, as an object."""
    place, colon, attribute = name.rpartition(":")
    if not (place and colon and attribute):
        raise ValueError(
            f"expected module:Name or path/to/file.py:Name, got {name!r}. "
            "Example: sdegen:VP"
        )
    module = _module(place)
    if not hasattr(module, attribute):
        hint = _hint(attribute, _candidates(module), f"{place}:{{}}".format, cutoff=0.0)
        raise ValueError(f"{place} has no name {attribute}.{hint}")
    found = getattr(module, attribute)
    if isinstance(found, KINDS):
        return found
    if not callable(found):
        raise _no_process(f"{name} is {type(found).__name__}")
    if inspect.isclass(found) and not issubclass(found, KINDS):
        raise _no_process(f"{name} is another class")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ValueError(f"{name} is abstract: it does not define {missing}.")
    if needed := _arguments(found):
        raise ValueError(
            f"{name} needs arguments ({', '.join(needed)}). Give them defaults, or "
            "write a function without arguments that returns the object, and name it."
        )
    try:
        made = found()
    except Exception as error:  # the user's code
        raise ValueError(f"{name}() raised {_told(error)}") from error
    if not isinstance(made, KINDS):
        raise _no_process(f"{name}() returned {type(made).__name__}")
    return made


def _no_process(found):
    return ValueError(
        f"{found}, which derives neither from AbstractSDE nor from AbstractPath; "
        "expected a process, its class, or a function that returns one."
    )


def _told(error):
    """An exception and its place in one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    where = f"{Path(place.filename).name}, line {place.lineno}"
    return f"{type(error).__name__} ({where}): {text}"


def _arguments(factory):
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return []
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in loose]


def _candidates(module):
    def usable(value):
        if not inspect.isclass(value):
            return isinstance(value, KINDS)
        return issubclass(value, KINDS) and not inspect.isabstract(value)

    return [name for name, value in vars(module).items() if usable(value)]


def _hint(word, names, shown=str, cutoff=0.4):
    near = difflib.get_close_matches(word, names, 1, cutoff)
    return f" Did you mean {shown(near[0])}?" if near else ""


def _module(place):
    """Import a module by name, or a file by its path."""
    path = Path(place)
    if path.suffix == ".py" and not path.is_file():
        names = [p.name for p in path.parent.glob("*.py")]
        hint = _hint(path.name, names, path.with_name)
        raise ValueError(f"there is no file {place}.{hint}")
    try:
        if path.suffix == ".py":
            return import_file(path)
        # As for `python -m`: the current directory counts.
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise ValueError(_no_module(place, error)) from error
    except Exception as error:  # the user's code
        raise ValueError(f"importing {place} raised {_told(error)}") from error


def _no_module(place, error):
    if error.name and not place.startswith(error.name):
        return f"importing {place} needs the module {error.name}, which is missing."
    here = [path.stem for path in Path.cwd().glob("*.py")]
    hint = "" if "." in place else _hint(place, [*here, "sdegen"])
    return (
        f"there is no module {place}.{hint} Run from the directory that holds it, or "
        "give the file: path/to/file.py:Name"
    )
