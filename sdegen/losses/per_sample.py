"""Which samples of a whole batch one device holds, and the random numbers of each."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from ..typing import AxisName, RandomKey


def batch_index(
    n: int, axis_name: AxisName | None = None
) -> tuple[Int[Array, " n"], int]:
    """The places of `n` samples in the whole batch, and the size of that batch.

    **Arguments:**
    - `n`: samples on this device.
    - `axis_name`: the mapped axis, under `jax.pmap` or `shard_map`; None, the default,
      for a batch that is whole.
    """
    if axis_name is None:
        return jnp.arange(n), n
    first = n * jax.lax.axis_index(axis_name)
    return jnp.arange(n) + first, n * jax.lax.axis_size(axis_name)


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
