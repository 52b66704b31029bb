"""Training states on disk, through Orbax: written whole, checked when they are read.

Every array is saved with a fingerprint, a sum over its bits that is the same on any
mesh. What is read back must have it; a checkpoint that was cut short or damaged is
named, set aside, and the one before it is taken.
"""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32

from .recorder import differing

State = TypeVar("State")


def named(tree) -> dict[str, Array]:
    """The arrays of `tree` by their place in it, a structure that Orbax knows."""
    return {jax.tree_util.keystr(k): v for k, v in jax.tree.leaves_with_path(tree)}


def save(directory: str | Path, state, *, replace: bool = False) -> Path:
    """Write the arrays of `state` to `directory`, which must not exist; returns it.

    Orbax writes next to it and renames at the end, so it is whole or absent. With
    `replace` it may exist.
    """
    directory = Path(directory).absolute()
    if directory.exists() and not replace:
        raise FileExistsError(
            f"{directory} exists already; nothing was written. Save to a new directory."
        )
    return save_named(directory, named(state))


def save_named(directory: str | Path, arrays: dict[str, Array]) -> Path:
    """Write `arrays`, by the names that `named` gives, over what is in `directory`."""
    directory = Path(directory).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, arrays, force=True)
    return directory


def restore(directory: str | Path, like: State) -> State:
    """The state saved in `directory`, with the structure and shardings of `like`."""
    directory = Path(directory).absolute()
    if not directory.is_dir():
        raise FileNotFoundError(f"no checkpoint at {directory}.")
    target = named(like)
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(directory).item_metadata
        shapes = {k: tuple(v.shape) for k, v in dict(saved).items()}
        wanted = {k: tuple(v.shape) for k, v in target.items()}
        if shapes != wanted:
            odd = min(k for k, _ in set(shapes.items()) ^ set(wanted.items()))
            raise ValueError(
                f"the checkpoint at {directory} holds another state than the one asked "
                f"for: they differ at {odd}. Restore with the network and the "
                "optimiser that were saved."
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        arrays = checkpointer.restore(directory, abstract)
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[k] for k in target])


@jax.jit
def fingerprint(leaves: Sequence[Array]) -> UInt32[Array, " leaves"]:
    """For each array a weighted sum of its bits modulo 2^32, the same on any mesh.

    Whole-number sums do not depend on their order; odd weights that differ from place
    to place see a changed bit, and two values that were exchanged.
    """

    def one(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.bool_):
            leaf = leaf.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(leaf, _unsigned(leaf.dtype))
        if bits.dtype.itemsize == 8:
            bits = (bits ^ (bits >> 32)).astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            iota = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            place = place * jnp.uint32(size % 2**32) + iota
        weight = (place * jnp.uint32(2654435761)) ^ (place >> 15)
        return jnp.sum(bits.astype(jnp.uint32) * (2 * weight + 1), dtype=jnp.uint32)

    return jnp.stack([one(leaf) for leaf in leaves])


def _unsigned(dtype):
    return jnp.dtype(f"uint{8 * dtype.itemsize}")


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpoints.latest` found: the step, the arrays, and what was set aside."""

    step: int
    arrays: dict[str, Array]
    damaged: tuple[int, ...]


class Checkpoints:
    """Checkpoints of one run under `directory`, one folder per step.

    Saving is asynchronous: `save` copies the arrays to the host and returns. A folder
    appears whole, by a rename, or not at all. All processes call everything alike.

    **Arguments:** `keep`, how many of the last are kept (None: all); `identity`, what
    the run is, as plain JSON, saved along; a directory of another run is refused
    (None: any will do).
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int | None = 3,
        identity: dict[str, Any] | None = None,
    ):
        self.directory = Path(directory).absolute()
        self.identity = json.loads(json.dumps(identity))
        self._keep, self._manager = keep, None
        if identity is not None:
            self._check_identity()

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints that are there, in order."""
        if not self.directory.is_dir():
            return []
        names = [path.name for path in self.directory.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, step: int, arrays: dict[str, Array]) -> None:
        """Begin to write `arrays` as the checkpoint of `step`, if it is not there.

        Raises OSError with a sentence if this or the one before it could not be
        written; the checkpoints that are there stay.
        """
        if step in self.steps():
            return
        try:
            manager = self._open()
            marks = jax.device_get(fingerprint(list(arrays.values())))
            meta = {
                "identity": self.identity,
                "shapes": _describe(arrays),
                "fingerprint": dict(zip(arrays, map(int, marks), strict=True)),
            }
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)
                ),
                force=True,
            )
        except Exception as error:
            raise self._failed(step, error) from error

    def metadata(self, step: int) -> dict[str, Any]:
        """What is saved along with the arrays of `step`: identity and fingerprints."""
        return json.loads(
            (self.directory / str(step) / "meta" / "metadata").read_text()
        )

    def wait(self) -> None:
        """Return when all that was saved is on disk; raises as `save` does."""
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
            except Exception as error:
                raise self._failed(None, error) from error

    def latest(self, like: dict[str, Array]) -> Restored | None:
        """The last checkpoint that is whole, laid out as `like`; None if there is none.

        A damaged one is renamed to `damaged-STEP`, with a warning, and the one before
        it is taken; if none is whole, ValueError, and all stay as they are.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                arrays = self.read(step, like)
            except _OtherRunError:
                raise
            except Exception as error:  # whatever a damaged file may lead to
                damaged[step] = _first_line(error)
                continue
            for bad, reason in damaged.items():
                self._set_aside(bad, reason, step)
            return Restored(step, arrays, tuple(damaged))
        if damaged:
            reasons = (f"step {n} ({reason})" for n, reason in damaged.items())
            raise ValueError(
                f"no checkpoint in {self.directory} can be read: "
                f"{'; '.join(reasons)}. Start the run anew in another directory."
            )
        return None

    def close(self) -> None:
        """Wait for what is being written, and close."""
        if self._manager is not None:
            manager, self._manager = self._manager, None
            try:
                manager.close()
            except Exception as error:
                raise self._failed(None, error) from error

    def _open(self):
        if self._manager is None:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=self._keep,
                    create=True,
                    cleanup_tmp_directories=True,
                    enable_async_checkpointing=True,
                ),
            )
        return self._manager

    def read(self, step: int, like: dict[str, Array] | None = None) -> dict[str, Array]:
        """The arrays of the checkpoint of `step`, compared with their fingerprints.

        Laid out as `like`, or on one device. Raises if it is not whole.
        """
        place = self.directory / str(step)
        meta = self.metadata(step)
        if like is None:
            like = _shapes(place)
        difference = differing(meta["shapes"], _describe(like))
        if difference:
            raise _OtherRunError(
                f"the checkpoint at {place} holds another state than this run's: "
                f"{difference}. Restore with the network and the optimiser that were "
                "saved."
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        with ocp.Checkpointer(_handler()) as checkpointer:
            wanted = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            arrays = checkpointer.restore(place, args=wanted).state
        marks = jax.device_get(fingerprint([arrays[name] for name in like]))
        for name, mark in zip(like, marks, strict=True):
            if meta["fingerprint"][name] != int(mark):
                raise ValueError(f"the array {name} is not the one that was saved")
        return {name: arrays[name] for name in like}

    def _set_aside(self, step, reason, instead):
        place = self.directory / str(step)
        if jax.process_index() == 0:
            aside = self.directory / f"damaged-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            place.rename(aside)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"damaged-{step}")
        warnings.warn(
            f"the checkpoint of step {step} is damaged ({reason}); it is now called "
            f"damaged-{step}, and that of step {instead} is used.",
            stacklevel=4,
        )

    def _check_identity(self):
        """Refuse a directory whose last readable checkpoint is of another run."""
        for step in reversed(self.steps()):
            try:
                saved = self.metadata(step)["identity"]
            except (OSError, ValueError, KeyError):
                continue
            difference = differing(saved, self.identity)
            if difference:
                raise ValueError(
                    f"{self.directory} holds another run: {difference}. Go on with "
                    "the same settings, or choose another directory."
                )
            return

    def _failed(self, step, error):
        what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        whole = self.steps()
        last = f"step {whole[-1]} is" if whole else "none is"
        return OSError(
            f"{what} could not be written to {self.directory} "
            f"({_first_line(error)}). Nothing that was saved is lost: of the whole "
            f"ones {last} the last. Free some space and start the same command again; "
            "it goes on from there."
        )


class _OtherRunError(ValueError):
    """The checkpoint is whole, but of another run."""


def _first_line(error):
    return f"{(str(error).strip().splitlines() or [type(error).__name__])[0]:.200}"


def _describe(arrays):
    """Shape and type of each array, as plain JSON."""
    return {name: f"{a.dtype}{list(a.shape)}" for name, a in arrays.items()}


def _handler():
    return ocp.CompositeCheckpointHandler(
        state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler()
    )


def _shapes(place):
    """Shapes and types of the arrays in `place`, for one device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.Checkpointer(_handler()) as checkpointer:
        saved = dict(checkpointer.metadata(place).item_metadata.state)
    return {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device)
        for name, a in saved.items()
    }
