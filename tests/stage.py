"""A place where scripts run one after another, each in a child of its own.

It imports once what all of them import and forks a child for each script, so that a
script costs no start of Python; the JAX backend is only started in the children. A line
of JSON says what runs, {"words": [...], "out": file, "err": file}: a script's path, or
"-c" and a program, and its arguments. The exit code is the answer, a line too.
"""

import json
import os
import runpy
import sys
import traceback


def play(words, out, err):
    """Run one command line in this process; its exit code."""
    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.argv, program = words, None
    try:
        if words[0] == "-c":
            program = compile(words[1], "<page>", "exec")
            exec(program, {"__name__": "__main__"})
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main():
    import flax.nnx  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import optax  # noqa: F401
    import scipy.stats  # noqa: F401
    import tyro  # noqa: F401

    import sdegen.nets  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            code = play(**json.loads(line))
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        status = os.waitpid(pid, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
