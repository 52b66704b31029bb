"""Leaving in good order when a machine is taken away (SIGTERM, preemption)."""

import math
import signal
import threading

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ..mesh import batch_axes, batch_sharding

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

    With several processes each hands its note to the compiled call (`aux`), which
    returns whether any of them has one: all learn it from the same call, and stop
    after the same one. No process waits for another that it would not wait for anyway.
    """

    def __init__(self, mesh: Mesh | None):
        self._told, self._before = False, None
        self._mesh = mesh if jax.process_count() > 1 else None

    def __enter__(self):
        # Python lets only the main thread set handlers. In a cluster this replaces the
        # handler of JAX's own service.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number, frame):
        self._told = True
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def aux(self) -> Int[Array, " devices"] | None:
        """This process's note on each of its devices; None with one process."""
        if self._mesh is None:
            return None
        sharding = batch_sharding(self._mesh)
        size = math.prod(self._mesh.shape[axis] for axis in batch_axes(self._mesh))
        return jax.make_array_from_callback(
            (size,), sharding, lambda _: np.full(1, self._told, np.int32)
        )

    def requested(self, heard: bool) -> bool:
        """Whether to stop now; `heard`, what a call has returned of the notes."""
        return self._told if self._mesh is None else heard

    def __exit__(self, *error):
        if self._before is not None and not self._told:
            signal.signal(signal.SIGTERM, self._before)
