"""Device meshes with automatic axes, and how batches and parameters lie on them.

The axes that training knows: "data" splits the batch; "fsdp" splits the batch too, and
with it parameters, averages and the optimiser's state (Rajbhandari et al. 2020, "ZeRO",
stage 3; Zhao et al. 2023). Any other axis ("trial" of a sweep, say) is left alone.

`jax.make_mesh` defaults to explicit axes, on which vmapped Diffrax solves do not trace;
automatic ones let the compiler place the batch, and one jitted function runs on any
mesh.
"""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ._compat import multihost_utils
from .typing import PyTree

SMALL = 2**10
"""Arrays with fewer elements stay whole: gathering them costs more than it saves."""


def data_mesh(devices: int | None = None) -> Mesh:
    """A mesh of `devices` (default all) along one axis, "data"."""
    return make_mesh({"data": -1 if devices is None else devices})


def make_mesh(axes: str | dict[str, int]) -> Mesh:
    """A mesh from its axes in order: {"data": 2, "fsdp": 4}, or "data:2,fsdp:4".

    One size may be -1, "all the rest of the devices"; in text it may be left out:
    "fsdp" is every device. Sizes that need fewer devices take the first ones.
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
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        (AxisType.Auto,) * len(axes),
        devices=jax.devices()[:devices],
    )


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
    """The leading axis (or axis number `axis`) split over the mesh."""
    return NamedSharding(mesh, P(*[None] * axis, batch_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def parameter_sharding(tree: PyTree, mesh: Mesh) -> PyTree:
    """For each array of `tree` (or its shape): its largest axis split over "fsdp".

    The largest that the number of devices divides; arrays of fewer than `SMALL`
    elements, arrays with no such axis, and all of them on a mesh without the axis
    "fsdp", are replicated. Works from shapes alone, so that parameters can be born
    sharded: `jax.jit(init, out_shardings=parameter_sharding(shapes, mesh))`.
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
    """Arrays that every process holds whole, laid out on a mesh of all processes."""

    def put(leaf, sharding):
        if not isinstance(leaf, jax.Array | np.ndarray) or (
            getattr(leaf, "sharding", None) == sharding
        ):
            return leaf
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            impl = jax.random.key_impl(leaf)
            data = put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=impl)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

    return jax.tree.map(put, tree, shardings)


def to_host(x: jax.Array) -> np.ndarray:
    """An array, however it lies on the devices of all processes, whole on the host."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
