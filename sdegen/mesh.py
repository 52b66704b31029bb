"""Device meshes with automatic axes, and how batches and parameters lie on them.

The axes that training knows: "data" splits the batch; "fsdp" splits the batch too, and
with it parameters, averages and the optimiser's state (Rajbhandari et al. 2020, "ZeRO",
stage 3; Zhao et al. 2023). Any other axis ("trial" of a sweep, say) is left alone.
Vmapped Diffrax solves do not trace on explicit axes, the default of `jax.make_mesh`.
"""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ._compat import multihost_utils
from .typing import PyTree, is_key

SMALL = 2**10
"""Arrays with fewer elements stay whole: gathering them costs more than it saves."""


def data_mesh(devices: int | None = None) -> Mesh:
    """A mesh of so many `devices` (default all) along one axis, "data"."""
    return make_mesh({"data": -1 if devices is None else devices})


def make_mesh(axes: str | dict[str, int]) -> Mesh:
    """A mesh with automatic axes, on the first devices where it needs fewer than all.

    **Arguments:**
    - `axes`: sizes by name in order, {"data": 2, "fsdp": 4}, or "data:2,fsdp:4". One
      size may be -1, all devices that are left; in text it may be left out.

    **Raises:** ValueError if there are fewer devices, or for what is no mesh.
    """
    if isinstance(axes, str):
        axes = _parse(axes)
    available = jax.device_count()
    known = math.prod(size for size in axes.values() if size != -1)
    rest = [name for name, size in axes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"only one axis of a mesh can take the rest, got {axes}.")
    if rest:
        axes = axes | {rest[0]: max(available // max(known, 1), 1)}
    devices = math.prod(axes.values())
    if not axes or min(axes.values()) < 1 or devices > available:
        sizes = ", ".join(f"{name}:{size}" for name, size in axes.items())
        raise ValueError(
            f"asked for a mesh of {devices} devices, {available} are here ({sizes})."
        )
    sizes, kinds = tuple(axes.values()), (AxisType.Auto,) * len(axes)
    return jax.make_mesh(sizes, tuple(axes), kinds, devices=jax.devices()[:devices])


def _parse(text):
    axes = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, _, size = word.partition(":")
        known = re.fullmatch(r"-1|[0-9]*", size)
        if not name.isidentifier() or not known or name in axes:
            raise ValueError(
                'a mesh is written as its axes with their sizes, "data:2,fsdp:4", or '
                f'"fsdp" for all devices along one axis, got {text!r}.'
            )
        axes[name] = int(size or -1)
    return axes


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes of the mesh that split a batch."""
    return tuple(name for name in mesh.axis_names if name in ("data", "fsdp"))


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The axis number `axis`, default the leading one, split over the mesh."""
    return NamedSharding(mesh, P(*[None] * axis, batch_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def parameter_sharding(tree: PyTree, mesh: Mesh) -> PyTree:
    """For each array the largest axis split over "fsdp", of those that it divides.

    Arrays of fewer than `SMALL` elements, arrays with no such axis, and all arrays on a
    mesh without the axis "fsdp" are replicated.

    **Arguments:**
    - `tree`: a pytree of arrays or, as for `out_shardings` of a jitted init, of shapes.
    - `mesh`: from `make_mesh`.
    """
    parts = mesh.shape.get("fsdp", 1)

    def rule(leaf):
        shape = getattr(leaf, "shape", ())
        fitting = [i for i, size in enumerate(shape) if size % parts == 0]
        if parts == 1 or math.prod(shape) < SMALL or not fitting:
            return replicated(mesh)
        axis = max(fitting, key=lambda i: shape[i])
        return NamedSharding(mesh, P(*[None] * axis, "fsdp"))

    return jax.tree.map(rule, tree)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Lay arrays that every process holds whole out on a mesh of all processes.

    **Arguments:**
    - `tree`: a pytree; what is no array stays as it is.
    - `shardings`: one for each leaf.
    """

    def put(leaf, sharding):
        if not isinstance(leaf, jax.Array | np.ndarray) or (
            getattr(leaf, "sharding", None) == sharding
        ):
            return leaf
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and is_key(leaf):
            impl = jax.random.key_impl(leaf)
            data = put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=impl)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

    return jax.tree.map(put, tree, shardings)


def to_host(x: jax.Array) -> np.ndarray:
    """A whole array on the host, however it lies on the devices of all processes."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
