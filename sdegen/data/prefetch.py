"""Batches put on the device while the step before them runs."""

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

_PATIENCE = 10.0  # seconds that `close` waits for a read in progress


def prefetch(
    iterator: Iterator[Any], put: Callable[[Any], Any], depth: int = 2
) -> "Prefetch":
    """`put(batch)` of every batch, made ahead of use by a background thread.

    The thread starts at once, and ends with the iterator, with `close()`, with a `with`
    block, or when the result is dropped; then it closes the iterator. An exception in
    it is raised in the place of its batch.

    **Arguments:**
    - `iterator`: the batches.
    - `put`: applied to each, for instance `jax.device_put`.
    - `depth`: the most batches ahead of their use, default 2.
    """
    if depth < 1:
        raise ValueError(f"prefetch needs depth >= 1, got {depth}.")
    return Prefetch(iterator, put, depth)


class Prefetch(Iterator[Any], contextlib.AbstractContextManager):
    """The iterator that `prefetch` returns."""

    def __init__(self, iterator: Iterator[Any], put: Callable, depth: int):
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        stop = threading.Event()
        # The thread does not refer to this object, so dropping the object ends it.
        thread = threading.Thread(
            target=_work,
            args=(iter(iterator), put, self._ready, self._room, stop),
            name="sdegen-prefetch",
            daemon=True,
        )
        self._end = weakref.finalize(self, _end, thread, self._ready, self._room, stop)
        thread.start()

    def __next__(self) -> Any:
        if not self._end.alive:
            raise StopIteration
        item, error = self._ready.get()
        if error is not None:
            self.close()
            raise error
        self._room.release()
        return item

    def close(self) -> None:
        """End the thread; waits at most ten seconds for a read in progress."""
        self._end()

    def __exit__(self, *_) -> None:
        self.close()


def _work(iterator, put, ready, room, stop):
    try:
        while True:
            # Room first: no more than `depth` batches exist ahead of the consumer.
            room.acquire()
            if stop.is_set():
                return
            ready.put((put(next(iterator)), None))
    except BaseException as error:  # StopIteration too: it ends the consumer's loop
        ready.put((None, error))
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


def _end(thread, ready, room, stop):
    stop.set()
    room.release()
    if thread is not threading.current_thread():  # where a collection may run
        thread.join(_PATIENCE)
    while not ready.empty():
        ready.get()
