"""Samples of files, or of any random-access source, as a stream read by Grain."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from .._compat import need
from .stream import AbstractStream, Batch, is_data, row_numbers

_PIECE = 16  # samples that a thread reads at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Files(AbstractStream):
    """Samples of any random-access source, read ahead and decoded by Grain.

    **Arguments:**
    - `source`: an object with `__len__` and `__getitem__(i)`, such as `ImageFolder`,
      `array_records(...)`, `tfds.data_source(...)` or a list.
    - `decode`: from an item of the source to `x` or `(x, cond)`, default the identity.
      Samples of one batch must have one shape.
    - `threads`: that read and decode at the same time, default 16; 0 for memory.
    - `workers`: processes, for a `decode` that holds the interpreter's lock, default 0.
      The start of the program must then be under `if __name__ == "__main__":`.

    **Raises:** in the place of a batch, what `source` or `decode` raise for it;
    `ImportError` without Grain (`pip install 'sdegen[data]'`).
    """

    source: Any
    decode: Callable[[Any], Any] | None = None
    threads: int = 16
    workers: int = 0

    def __post_init__(self):
        _grain()
        if not all(hasattr(self.source, m) for m in ("__len__", "__getitem__")):
            raise ValueError(
                "Files takes a source with __len__ and __getitem__(i), got "
                f"{type(self.source).__name__}. Wrap it in a class that has both."
            )
        if not len(self.source):
            raise ValueError("the source of Files is empty: its length is 0.")
        if self.threads < 0 or self.workers < 0:
            raise ValueError(
                f"Files needs threads >= 0 and workers >= 0, got {self.threads} and "
                f"{self.workers}."
            )

    def __len__(self) -> int:
        return len(self.source)

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample x: item 0 is read to find it."""
        return _sample(self.source[0], self.decode)[0].shape

    def batches(
        self, seed: int, start: int, *, batch_size: int, rows: slice
    ) -> Iterator[Batch]:
        """See `AbstractStream.batches`."""
        return self._read(seed, start, batch_size, row_numbers(start, batch_size, rows))

    def _read(self, seed, start, batch_size, chosen):
        grain = _grain()
        # Epoch e of Grain's seed s is epoch e - 1 of its seed s + 1, and runs with
        # neighbouring seeds must have nothing in common.
        (own,) = np.random.SeedSequence(seed).generate_state(1)
        order = grain.MapDataset.source(self.source).shuffle(seed=int(own)).repeat()
        # Threads take pieces of a batch: handing over single samples cost up to four
        # times as much as reading them. Grain deals whole batches to processes.
        pieces = 1 if self.workers else -(-len(chosen) // _PIECE)
        parts = tuple(np.array_split(chosen, pieces))
        share = _Share(order, self.decode, start, batch_size, parts)
        share = grain.MapDataset.source(share)
        if self.workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # Grain 0.2.18 reads them in each process
                flags.FLAGS.mark_as_parsed()
            threads = -(-self.threads // self.workers)
            reading = grain.ReadOptions(threads, threads)
            workers = grain.multiprocessing.MultiprocessingOptions(self.workers)
            batches = share.batch(1, batch_fn=_stack).to_iter_dataset(reading)
            batches = batches.mp_prefetch(workers)
        else:
            ahead = max(self.threads, pieces) if self.threads else 0
            reading = grain.ReadOptions(self.threads, ahead)
            batches = share.to_iter_dataset(reading).batch(pieces, batch_fn=_stack)
        iterator = iter(batches)
        try:
            yield from iterator
        finally:
            close = getattr(iterator, "close", None)  # not in early versions of Grain
            if close is not None:
                close()


@dataclasses.dataclass(frozen=True)
class _Share:
    """The samples of one process as a source: the pieces of one batch after another."""

    order: Any
    decode: Callable[[Any], Any] | None
    start: int
    batch_size: int
    pieces: tuple[np.ndarray, ...]

    def __len__(self):
        return (sys.maxsize // self.batch_size - self.start) * len(self.pieces)

    def __getitem__(self, index):
        step, piece = divmod(int(index), len(self.pieces))
        first = (self.start + step) * self.batch_size
        rows = self.pieces[piece].tolist()
        return [_sample(self.order[first + row], self.decode) for row in rows]


def _sample(item, decode):
    """(x, cond) of one item, checked: Grain would drop an item that is None."""
    item = item if decode is None else decode(item)
    pair = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
    x = pair[0]
    if not isinstance(x, np.ndarray | np.generic | jax.Array) or not is_data(x.dtype):
        kind = getattr(x, "dtype", type(x).__name__)
        raise ValueError(
            "a sample must be x or (x, cond), with x an array of uint8 or floating "
            f"point, got {type(item).__name__} with x of {kind}. Give Files a "
            'decode, such as lambda item: (item["image"], None).'
        )
    return np.asarray(x), pair[1]


def _stack(pieces) -> Batch:
    xs, conds = zip(*itertools.chain(*pieces), strict=True)
    shapes = sorted({x.shape for x in xs})
    if len(shapes) > 1:
        raise ValueError(
            f"samples of one batch must have one shape, got {shapes[0]} and "
            f"{shapes[1]}. Crop or resize them in the decode of Files."
        )
    return np.stack(xs), jax.tree.map(lambda *leaves: np.stack(leaves), *conds)


def _grain():
    hint = "Arrays in memory do not need it."
    return need("grain", "reading files", extra="data", hint=hint)
