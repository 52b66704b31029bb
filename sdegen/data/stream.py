"""Batches of data that are not held on the device, as a function of (seed, step).

There is no other state, so a run continues exactly from the number of its step. The
order is shuffled first and then divided among the processes: together they read the
same global batch, however many they are.
"""

import abc
import dataclasses
import itertools
import zlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Int, Shaped

from ..typing import condition_arrays, data_array
from .batches import batch_indices

_SAMPLES = 8  # that a stream is known by
Batch: TypeAlias = tuple[Shaped[np.ndarray, "rows ..."], Any]


class AbstractStream(abc.ABC):
    """Samples on the host, in an order for every seed; `len` is that of an epoch."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample x."""

    @abc.abstractmethod
    def batches(
        self, seed: int, start: int, *, batch_size: int, rows: slice
    ) -> Iterator[Batch]:
        """The batches of the steps start, start + 1, ... without end.

        An epoch holds every sample once, in its own order, and may end inside a batch.

        **Arguments:**
        - `seed`: of the order.
        - `start`: the first step.
        - `batch_size`: samples of the global batch of a step.
        - `rows`: the part of the global batch that is wanted.

        **Returns:** pairs (x, cond): x, (rows, ...), uint8 or floating; cond, a pytree
        with the same leading axis, or None.
        """

    def fingerprint(self, seed: int) -> Any:
        """What the stream is, as plain JSON: a run does not go on with another.

        By default its class, and a checksum of the first samples of its order. Another
        declares it where these cost too much, or do not tell.

        **Arguments:**
        - `seed`: of the order.
        """
        size = min(len(self), _SAMPLES)
        batches = self.batches(seed, 0, batch_size=size, rows=slice(0, size))
        arrays = map(np.asarray, jax.tree.leaves(next(iter(batches))))
        kind = {"class": type(self).__name__, "shape": list(self.shape)}
        return kind | {"crc32": [zlib.crc32(np.ascontiguousarray(a)) for a in arrays]}


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays(AbstractStream):
    """NumPy arrays on the host, which may be memory-mapped (`np.load(mmap_mode="r")`).

    The order is that of `batch_indices`, as for arrays that `fit` holds on the device.

    **Arguments:**
    - `x`: the data, (n, ...), floating, or uint8 for images.
    - `cond`: a pytree of arrays with leading axis n, default None.
    """

    x: Any
    cond: Any = None

    def __post_init__(self):
        # np.asanyarray keeps a memory map what it is.
        x = np.asanyarray(data_array(self.x, "Arrays", images=True))
        object.__setattr__(self, "x", x)
        if not len(x):
            raise ValueError(f"Arrays takes at least one sample, got shape {x.shape}.")
        cond = jax.tree.map(np.asanyarray, condition_arrays(self.cond, len(self.x)))
        object.__setattr__(self, "cond", cond)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample x."""
        return self.x.shape[1:]

    def batches(
        self, seed: int, start: int, *, batch_size: int, rows: slice
    ) -> Iterator[Batch]:
        """See `AbstractStream.batches`."""
        chosen = row_numbers(start, batch_size, rows)

        def batch(step):
            (index,) = batch_indices(seed, step, 1, n=len(self), batch_size=batch_size)
            index = index[chosen]
            return self.x[index], jax.tree.map(lambda leaf: leaf[index], self.cond)

        return map(batch, itertools.count(start))


def row_numbers(start, batch_size, rows) -> Int[np.ndarray, " rows"]:
    """The numbers of the wanted rows of the global batch."""
    chosen = np.arange(max(batch_size, 0))[rows]
    if start < 0 or not len(chosen):
        raise ValueError(
            "batches needs start >= 0, batch_size >= 1 and some rows of the batch, got "
            f"{start}, {batch_size} and {rows}."
        )
    return chosen


def is_data(dtype) -> bool:
    """Whether training takes numbers of this dtype: bytes or floating point."""
    return dtype == np.uint8 or jax.numpy.issubdtype(dtype, jax.numpy.floating)
