"""Experiments from the shell: a frozen dataclass becomes flags, through tyro.

Every field is a flag. A field that is a union of components (a process, a network, an
optimiser) becomes a choice, `process:vp --process.beta-max 15`.
"""

import dataclasses
import functools
import importlib.util
import inspect
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import AbstractArray

from ._compat import MissingPackageError, need
from .nets.network import AbstractNetworkConfig
from .training import NonFiniteError, Preempted

Config = TypeVar("Config")


def run(
    main: Callable[[Any], None],
    config: type,
    argv: list[str] | None = None,
    *,
    presets: Mapping[str, Any] | None = None,
) -> None:
    """Parse the command line and call `main` with the config.

    A sentence (bad input, a run that went non-finite, a full disk) ends the program
    with code 1 and without a traceback, a run that was told to stop with code 75.

    **Arguments:**
    - `main`: takes the config.
    - `config`: a frozen dataclass; fields may be configs themselves.
    - `argv`: the words to parse, default those of the process.
    - `presets`: configs by their names; the first word chooses one (default the first),
      whose fields are then the defaults.
    """
    try:
        main(parse(config, argv, presets=presets))
    except Preempted as stop:
        print(stop, file=sys.stderr)
        raise
    except (ValueError, OSError, NonFiniteError, MissingPackageError) as error:
        known = isinstance(error, NonFiniteError | MissingPackageError)
        if known or _ours(error, main):
            sys.exit(f"error: {error}")
        raise


def _ours(error: BaseException, main: Callable) -> bool:
    """Whether sdegen or the script, and not a library under them, raised `error`."""
    file = traceback.extract_tb(error.__traceback__)[-1].filename
    own = Path(__file__).parent in Path(file).parents
    return own or file == inspect.getsourcefile(main)


def compile_cache(directory: str | Path | None = None) -> None:
    """Keep compiled programs, so that the next start need not compile.

    **Arguments:**
    - `directory`: default $JAX_COMPILATION_CACHE_DIR, or ~/.cache/sdegen. It must be
      private: programs are run as they are found there.
    """
    settings: Any = jax.config
    if directory is None and settings.jax_compilation_cache_dir:
        return
    place = Path.home() / ".cache" / "sdegen" if directory is None else Path(directory)
    settings.update("jax_compilation_cache_dir", str(place))
    settings.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def import_file(path: Path) -> ModuleType:
    """Import a Python file, which may import its neighbours."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def parse(
    config: type[Config],
    argv: list[str] | None = None,
    *,
    presets: Mapping[str, Config] | None = None,
) -> Config:
    """The command line as a `config`; `--help` and mistakes end the program.

    The arguments are those of `run`.
    """
    tyro = need("tyro", "the command line", extra="cli")
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def _number(info):
        if not _is_array_type(info.type):
            return None
        scalar = info.type.dims == ()
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1 if scalar else "*",
            metavar="FLOAT" if scalar else "[FLOAT [...]]",
            instance_from_str=functools.partial(_from_text, scalar),
            is_instance=lambda x: isinstance(x, float | int | np.ndarray | jax.Array),
            str_from_instance=lambda x: [f"{v:g}" for v in np.ravel(x)],
        )

    _name_networks(tyro, AbstractNetworkConfig)
    # A union is chosen by its component's name; flags of outer fields go anywhere.
    chosen = config
    if presets:
        argv = sys.argv[1:] if argv is None else argv
        if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
            argv = [next(iter(presets)), *argv]
        chosen = tyro.extras.subcommand_type_from_defaults(presets)
    marked = tyro.conf.CascadeSubcommandArgs[chosen]
    description = wrapped(sys.modules[config.__module__].__doc__ or "")
    return tyro.cli(marked, args=argv, description=description, registry=registry)


def wrapped(text: str, width: int | None = None) -> str:
    """A docstring for a help text: prose and commands in lines of the terminal.

    Tables stay as they are. Every line begins with a space, because tyro joins lines
    that begin with a letter.

    **Arguments:**
    - `text`: paragraphs and lists; of commands and tables every line is indented.
    - `width`: columns; those of the terminal, at most 100.
    """
    width = min(shutil.get_terminal_size().columns, 100) if width is None else width
    fold = textwrap.TextWrapper(break_long_words=False, break_on_hyphens=False)
    lines = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        verbatim = paragraph.startswith(" ")
        for block in re.split("\n" if verbatim else "\n(?=- )", paragraph):
            words = block.split()
            first = " " * (1 + len(block) - len(block.lstrip()))
            if verbatim and words[0] not in ("python", "sdegen"):
                lines.append(" " + block)
                continue
            more = "    " if verbatim else "  " if words[0] == "-" else ""
            end = " \\" if verbatim else ""  # the shell goes on after a backslash
            fold.width, fold.initial_indent = width - len(end), first
            fold.subsequent_indent = first + more
            lines.append(f"{end}\n".join(fold.wrap(" ".join(words))))
        lines.append("")
    return "\n".join(lines).rstrip()


def _name_networks(tyro, kind):
    """An `MLPConfig` is chosen by the word `mlp`, and so every network."""
    word = kind.__name__.removesuffix("Config").lower()
    tyro.conf.configure(tyro.conf.subcommand(word))(kind)
    for subclass in kind.__subclasses__():
        _name_networks(tyro, subclass)


def _from_text(scalar, words):
    return float(words[0]) if scalar else np.array([float(word) for word in words])


def _is_array_type(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, AbstractArray)


def shrink(config: Config, **fields: Any) -> Config:
    """`config` with `fields` replaced if its `quick` is set: a run of seconds."""
    return dataclasses.replace(config, **fields) if config.quick else config  # type: ignore
