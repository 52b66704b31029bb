"""The batch of step n as a function of (seed, n), on any mesh.

Arrays stay on the device, and a step gets the numbers of its rows; an `AbstractStream`
is read ahead by a thread. Both reach the compiled loop in chunks of several steps.
"""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..data.batches import batch_indices
from ..data.prefetch import prefetch
from ..data.stream import AbstractStream
from ..mesh import batch_axes, batch_sharding, place, replicated
from ..models.units import compare, in_units_of
from ..typing import PyTree, data_array


class Feed:
    """The data of a run: `arrays`, (x, cond) on the device, or a stream.

    **Arguments:**
    - `data`, `cond`, `mesh`: see `fit`.
    - `batch_size`, `seed`, `accumulate`: see `TrainingConfig`.
    """

    def __init__(
        self,
        data: Any,
        cond: PyTree,
        *,
        batch_size: int,
        seed: int,
        mesh: Mesh | None,
        accumulate: int = 1,
    ):
        check_batch(batch_size, mesh, accumulate)
        self.batch_size, self.seed, self.mesh = batch_size, seed, mesh
        self.length, self.stream, self.arrays = len(data), None, None
        self._believes: Any = None
        if isinstance(data, AbstractStream):
            if cond is not None:
                raise ValueError(
                    "a stream brings its conditions with it: leave out cond, or give "
                    "it to the stream."
                )
            self.stream = data
        else:
            check_data(data, cond)
            self.arrays = (jnp.asarray(data), jax.tree.map(jnp.asarray, cond))
            if mesh is not None:
                whole = jax.tree.map(lambda _: replicated(mesh), self.arrays)
                self.arrays = place(self.arrays, whole)

    def in_units(self, model: Any) -> Any:
        """`model` in the units of the data, if it was not told them; of arrays alone.

        The first batch of a stream is compared with what the model believes.
        """
        if self.arrays is not None:
            return in_units_of(model, self.arrays[0])
        self._believes = model
        return model

    def chunks(self, start: int, counts: Iterator[int]):
        """A context of an iterator over what each call of `counts` steps needs.

        That is rows (count, batch) of `arrays`, or batches (count, batch, ...).
        """
        if self.stream is None:
            return closing(self._rows(start, counts))
        batches = self.stream.batches(
            self.seed, start, batch_size=self.batch_size, rows=self._my_rows()
        )
        return closing(prefetch(_stacked(batches, counts), self._put))

    def _rows(self, step, counts):
        sizes = {"n": self.length, "batch_size": self.batch_size}
        for count in counts:
            rows = batch_indices(self.seed, step, count, **sizes)
            step += count
            if self.mesh is None:
                yield jnp.asarray(rows)
            else:
                yield place(rows, batch_sharding(self.mesh, axis=1))

    def _put(self, chunk):
        if self._believes is not None:
            compare(self._believes, as_float(chunk[0][0]))
            self._believes = None
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, chunk)
        sharding = batch_sharding(self.mesh, axis=1)

        def put(a):
            shape = (a.shape[0], self.batch_size, *a.shape[2:])
            return jax.make_array_from_process_local_data(sharding, a, shape)

        return jax.tree.map(put, chunk)

    def _my_rows(self):
        """The rows of a global batch that this process's devices hold, contiguous."""
        if self.mesh is None:
            return slice(0, self.batch_size)
        size, sharding = self.batch_size, batch_sharding(self.mesh)
        index = sharding.addressable_devices_indices_map((size,)).values()
        spans = [span[0].indices(size)[:2] for span in index if span is not None]
        return slice(min(a for a, _ in spans), max(b for _, b in spans))


def _stacked(batches, counts):
    """The next `count` of `batches` as one, for each count."""
    for count in counts:
        several = [next(batches) for _ in range(count)]
        yield jax.tree.map(lambda *a: np.stack(a), *several)


def take(arrays: PyTree, fed: PyTree) -> tuple[Any, PyTree]:
    """(x, cond) of one step from its part of a chunk."""
    return fed if arrays is None else jax.tree.map(lambda a: a[fed], arrays)


def as_float(x):
    """Bytes 0 .. 255 as float32 in [-1, 1]; floating-point data as they are."""
    return x if x.dtype != jnp.uint8 else x.astype(jnp.float32) / 127.5 - 1


def check_batch(batch_size: int, mesh: Mesh | None, accumulate: int) -> None:
    """Refuse a batch that the mesh, or `accumulate`, cannot divide."""
    if mesh is not None and not batch_axes(mesh):
        raise ValueError(
            'fit needs a mesh with an axis "data" or "fsdp", got axes '
            f"{mesh.axis_names}. See sdegen.mesh.make_mesh()."
        )
    parts = 1 if mesh is None else np.prod([mesh.shape[a] for a in batch_axes(mesh)])
    if accumulate < 1 or batch_size < 1 or batch_size % (parts * accumulate):
        times = f" times accumulate={accumulate}" if accumulate != 1 else ""
        raise ValueError(
            f"batch_size must be positive and divisible by the {parts} devices of the "
            f"mesh{times}, got {batch_size}."
        )


def check_data(data: Any, cond: PyTree) -> None:
    """Refuse arrays that cannot be trained on, with a sentence."""
    host = np.asarray(data_array(data, "fit", images=True))
    image = host.dtype == np.uint8
    if not len(host):
        raise ValueError(f"the data are empty: an array of shape {host.shape}.")
    if not image and not np.isfinite(host).all():
        row = int(np.argmin(np.isfinite(host.reshape(len(host), -1)).all(axis=1)))
        raise ValueError(
            f"the data must be finite, but row {row} holds NaN or infinity. Remove or "
            "repair it; nothing was trained or written."
        )
    for leaf in map(np.asarray, jax.tree.leaves(cond)):
        if leaf.shape[:1] != host.shape[:1]:
            raise ValueError(
                f"cond must have one row per sample: {len(host)} samples, got an array "
                f"of shape {leaf.shape}."
            )
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(leaf).all():
            raise ValueError("cond must be finite, but it holds NaN or infinity.")
