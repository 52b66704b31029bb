"""Leaving in good order when a machine is taken away (SIGTERM, preemption)."""

import signal
import threading

import jax

PREEMPTED = 75
"""The exit code of a run that was told to stop and saved (EX_TEMPFAIL): go on."""


class Preempted(SystemExit):
    """The run was told to stop; its state is saved. Ends the program with code 75."""

    def __init__(self, message: str, step: int):
        super().__init__(PREEMPTED)
        self.message, self.step = message, step

    def __str__(self):
        return self.message


class Preemption:
    """A context in which SIGTERM is noted, not obeyed at once; a second one is obeyed.

    With several processes JAX's own service tells all of them of the step after which
    all stop, whichever was told.
    """

    def __init__(self):
        self._told, self._before = False, None

    def __enter__(self):
        # Python lets only the main thread set handlers; JAX has its own in a cluster.
        main = threading.current_thread() is threading.main_thread()
        if main and jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number, frame):
        self._told = True
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def requested(self, call: int) -> bool:
        """Whether to save and stop after call number `call`.

        Every process asks after every call: JAX chooses a number not yet reached by
        any, and says yes at that one alone.
        """
        if jax.process_count() == 1:
            return self._told
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(call)

    def __exit__(self, *error):
        if self._before is not None and not self._told:
            signal.signal(signal.SIGTERM, self._before)
