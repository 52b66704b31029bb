"""Batches of data that are not held on the device, as a function of (seed, step).

Nothing is remembered between batches, so a run that stops goes on exactly where it was,
from the number of its step, on any number of processes. The order is shuffled first and
divided among the processes after: the concatenation of what they read is the same
global batch, however many they are.
"""

import abc
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Int, Shaped

from .batches import batch_indices

Batch: TypeAlias = tuple[Shaped[np.ndarray, "rows ..."], Any]


class AbstractStream(abc.ABC):
    """Samples on the host, in an order for every seed.

    `__len__` is the number of samples in an epoch; `shape` is that of one sample.
    """

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
        """(x, cond) for step = start, start + 1, ... without end.

        x, (rows, ...), uint8 or floating, is the part `rows` of the global batch of
        `batch_size` samples of that step; cond is a pytree with the same leading axis,
        or None. Epochs run on across batches; each holds every sample once, in an
        order of its own.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays(AbstractStream):
    """NumPy arrays on the host, which may be memory-mapped (`np.load(mmap_mode="r")`).

    The order is that of `batch_indices`: the order in which `fit` sees an array that is
    held on the device.

    **Arguments:** `x`, (n, ...), uint8 or floating; `cond`, a pytree of arrays with
    leading axis n, or None.
    """

    x: Any
    cond: Any = None

    def __post_init__(self):
        object.__setattr__(self, "x", _host(self.x))
        object.__setattr__(self, "cond", jax.tree.map(_host, self.cond))
        if self.x.ndim < 2 or not len(self.x) or not is_data(self.x.dtype):
            raise ValueError(
                "Arrays takes uint8 or floating-point data of shape (n, ...), at least "
                f"two axes and one sample, got {self.x.dtype} of shape {self.x.shape}."
            )
        for leaf in jax.tree.leaves(self.cond):
            if leaf.shape[:1] != self.x.shape[:1]:
                raise ValueError(
                    f"cond must have one row per sample: {len(self.x)} samples, got an "
                    f"array of shape {leaf.shape}."
                )

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
    """The numbers of the rows of the global batch that are asked for."""
    chosen = np.arange(max(batch_size, 0))[rows]
    if start < 0 or not len(chosen):
        raise ValueError(
            "batches needs start >= 0, batch_size >= 1 and some rows of the batch, got "
            f"{start}, {batch_size} and {rows}."
        )
    return chosen


def _host(leaf):
    return leaf if isinstance(leaf, np.ndarray) else np.asarray(leaf)


def is_data(dtype) -> bool:
    """Whether training takes numbers of this kind: bytes or floating point."""
    return dtype == np.uint8 or jax.numpy.issubdtype(dtype, jax.numpy.floating)
