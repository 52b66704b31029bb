"""Device meshes with automatic axes, and the two shardings that data parallelism needs.

`jax.make_mesh` defaults to explicit axes, on which vmapped Diffrax solves do not trace;
automatic ones let the compiler place the batch, and one jitted function runs on any
mesh.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def data_mesh(devices: int | None = None) -> Mesh:
    """A mesh of `devices` (default all) along one axis, "data"."""
    available = jax.device_count()
    devices = available if devices is None else devices
    if not 1 <= devices <= available:
        raise ValueError(
            f"asked for a mesh of {devices} devices, {available} are here."
        )
    return jax.make_mesh(
        (devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the mesh."""
    return NamedSharding(mesh, P("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())
