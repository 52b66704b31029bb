"""The command `sdegen`, also `python -m sdegen`: `sdegen COMMAND ...`."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from ._compat import MissingPackageError, __version__

_COMMANDS = {
    "check": (
        "checks.command",
        "is a process, or a guided sampler, what it says it is?",
    ),
    "ema": ("training.posthoc_ema", "averages of any length, from a run's snapshots"),
    "report": ("runs.report", "runs compared, in one table and one picture"),
    "sweep": ("sweeps.command", "the trials of a sweep file, here or by many workers"),
}
"""For each command the module whose `main` it is, and what it is for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status, 2 for a mistake in the command line."""
    name, *rest = sys.argv[1:] if argv is None else argv or [""]
    if name in ("-h", "--help"):
        print("usage: sdegen COMMAND ...\n\ncommands:")
        print("\n".join(f"  {k:8}{text}" for k, (_, text) in _COMMANDS.items()))
        print("\n`sdegen COMMAND --help` has the options of a command.")
        return 0
    if name == "--version":
        print(f"sdegen {__version__}")
        return 0
    if name not in _COMMANDS:
        near = difflib.get_close_matches(name, _COMMANDS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        text = f"expected one of the commands {', '.join(_COMMANDS)}, got {name!r}."
        print(f"error: {text}{hint}", file=sys.stderr)
        return 2
    try:
        command = importlib.import_module(f"sdegen.{_COMMANDS[name][0]}")
        sys.argv[0] = f"sdegen {name}"  # as messages call the program
        return command.main(rest) or 0
    except MissingPackageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
