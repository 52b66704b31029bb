"""Which samples of a whole batch one device holds, and the random numbers of each."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from ..typing import AxisName, RandomKey


@dataclasses.dataclass
class Part:
    """Part `number` of a batch in `parts`: the samples i with i % parts = number."""

    number: Any
    parts: int
    asked: bool = False
    """Whether `batch_index` was called."""


_PART: ContextVar[Part | None] = ContextVar("part", default=None)


@contextmanager
def part_of_batch(number: Any, parts: int) -> Iterator[Part]:
    """What is traced inside sees samples `number`, `number` + `parts`, ... of a batch.

    So `batch_index` gives their places in the whole batch, as on a mesh, and no loss
    needs an argument for it.

    **Arguments:**
    - `number`: of the part, which may be traced.
    - `parts`: how many there are.
    """
    part = Part(number, parts)
    token = _PART.set(part)
    try:
        yield part
    finally:
        _PART.reset(token)


def batch_index(
    n: int, axis_name: AxisName | None = None
) -> tuple[Int[Array, " n"], int]:
    """The places of `n` samples in the whole batch, and the size of that batch.

    **Arguments:**
    - `n`: samples on this device.
    - `axis_name`: the mapped axis, under `jax.pmap` or `shard_map`; None, the default,
      for a batch that is whole.
    """
    index, total, part = jnp.arange(n), n, _PART.get()
    if axis_name is not None:
        index = index + n * jax.lax.axis_index(axis_name)
        total = n * jax.lax.axis_size(axis_name)
    if part is not None:
        part.asked = True
        index, total = index * part.parts + part.number, total * part.parts
    return index, total


def sample_keys(key: RandomKey, index: Int[Array, " n"]) -> Key[Array, " n"]:
    """fold_in(key, i) for every sample i: the same key for it on any mesh.

    **Arguments:**
    - `key`: the key of the batch.
    - `index`: the places of the samples in the whole batch, (n,).
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def draw_each(
    draw: Callable, keys: Key[Array, " n"], shape: tuple[int, ...], dtype
) -> Array:
    """draw(key, shape, dtype) for every key."""
    return jax.vmap(lambda key: draw(key, shape, dtype))(keys)
