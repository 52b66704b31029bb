"""Preemption: SIGTERM is noted, the state saved, and the program ends with code 75."""

import math
import signal
import threading

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ..mesh import batch_axes, batch_sharding

PREEMPTED = 75
"""The exit code of a run that was preempted and saved (EX_TEMPFAIL): start it again."""


class Preempted(SystemExit):
    """The run was preempted and its state is saved. Ends the program with code 75."""

    def __init__(self, message: str, step: int):
        super().__init__(PREEMPTED)
        self.message, self.step = message, step

    def __str__(self):
        return self.message


class Preemption:
    """A context that notes SIGTERM; a second signal acts at once.

    Of several processes each gives its flag to the compiled call, which returns the
    largest: all stop after the same call.
    """

    def __init__(self, mesh: Mesh | None):
        self._signalled, self._before = False, None
        self._mesh = mesh if jax.process_count() > 1 else None

    def __enter__(self):
        # Python lets only the main thread set handlers. In a cluster this replaces the
        # handler of JAX's own service.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number, frame):
        self._signalled = True
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def flags(self) -> Int[Array, " devices"] | None:
        """This process's flag on each of its devices; None with one process."""
        if self._mesh is None:
            return None
        sharding = batch_sharding(self._mesh)
        size = math.prod(self._mesh.shape[axis] for axis in batch_axes(self._mesh))
        return jax.make_array_from_callback(
            (size,), sharding, lambda _: np.full(1, self._signalled, np.int32)
        )

    def requested(self, by_any: bool) -> bool:
        """Whether to stop now; `by_any` is what a call has returned of the flags."""
        return self._signalled if self._mesh is None else by_any

    def __exit__(self, *error):
        if self._before is not None and not self._signalled:
            signal.signal(signal.SIGTERM, self._before)
