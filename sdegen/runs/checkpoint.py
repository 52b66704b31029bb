"""Training states on disk, through Orbax: written whole, checked when they are read.

Every array is saved with a fingerprint, a sum over its bits that is the same on any
mesh. A checkpoint that does not have it is set aside, and the one before it is taken.
"""

import json
import shutil
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from .._compat import multihost_utils, orbax, orbax_metadata
from .identity import comparable
from .recorder import differing, first_line, refuse_other

State = TypeVar("State")
_OF_ORBAX = ("_METADATA", "manifest.ocdbt")  # files of every state that was saved


def named(tree) -> dict[str, Array]:
    """The arrays of a pytree by their place in it, a structure that Orbax knows."""
    places = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(k): v for k, v in places if hasattr(v, "shape")}


def unnamed(arrays: dict[str, Array], like: State) -> State:
    """`like` with its arrays replaced by those of the same names."""

    def one(place, leaf):
        return arrays[jax.tree_util.keystr(place)] if hasattr(leaf, "shape") else leaf

    return jax.tree.map_with_path(one, like)


def save(directory: str | Path, state, *, replace: bool = False) -> Path:
    """Write a state to a directory, which is whole or absent at any time.

    **Arguments:**
    - `directory`: where; must not exist.
    - `state`: a pytree of arrays.
    - `replace`: the directory may exist, and is overwritten; no.

    **Returns:** the directory's absolute path.

    **Raises:** FileExistsError if it exists.
    """
    directory = Path(directory).expanduser().absolute()
    if directory.exists() and not replace:
        raise FileExistsError(
            f"{directory} exists already; nothing was written. Save to a new directory."
        )
    return save_named(directory, named(state))


def save_named(directory: str | Path, arrays: dict[str, Array]) -> Path:
    """Write `arrays`, by the names that `named` gives, over what is in `directory`."""
    directory = Path(directory).expanduser().absolute()
    with orbax().StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, arrays, force=True)
    return directory


def restore(directory: str | Path, like: State) -> State:
    """Read what `save` wrote.

    **Arguments:**
    - `directory`: what `save` was given.
    - `like`: a state whose structure, shapes and shardings the result takes.

    **Raises:** FileNotFoundError; ValueError for what `save` has not written, and if
    the shapes differ.
    """
    directory = Path(directory).expanduser().absolute()
    if not directory.is_dir():
        raise FileNotFoundError(f"no checkpoint at {directory}.")
    if not any((directory / name).exists() for name in _OF_ORBAX):
        raise ValueError(
            f"{directory} holds no state that sdegen.runs.checkpoint.save has written. "
            "Give the directory that it returned; for a run of `fit` use sdegen.load."
        )
    target = named(like)
    with orbax().StandardCheckpointer() as checkpointer:
        saved = dict(checkpointer.metadata(directory).item_metadata)
        shapes = [{k: list(v.shape) for k, v in d.items()} for d in (saved, target)]
        _refuse_other_state(directory, *shapes)
        abstract = jax.tree.map(orbax().utils.to_shape_dtype_struct, target)
        arrays = checkpointer.restore(directory, abstract)
    return unnamed(arrays, like)


@jax.jit
def fingerprint(leaves: Sequence[Array]) -> UInt32[Array, " leaves"]:
    """For each array a weighted sum of its bits modulo 2^32, the same on any mesh.

    Odd weights that differ from place to place see any changed bit or exchanged values.
    """

    def one(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.bool_):
            leaf = leaf.astype(jnp.uint8)
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned)
        if bits.dtype.itemsize == 8:
            bits = (bits ^ (bits >> 32)).astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            iota = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            place = place * jnp.uint32(size % 2**32) + iota
        weight = (place * jnp.uint32(2654435761)) ^ (place >> 15)
        return jnp.sum(bits.astype(jnp.uint32) * (2 * weight + 1), dtype=jnp.uint32)

    return jnp.stack([one(leaf) for leaf in leaves])


class Checkpoints:
    """The checkpoints of one run, one folder per step; saving is asynchronous.

    A folder appears whole or not at all. All processes of a run make the same calls.

    **Arguments:**
    - `directory`: where the folders lie.
    - `keep`: how many of the last are kept; None keeps all. Default 3.
    - `identity`: what the run is, as plain JSON, saved along; a directory of another
      run is refused. None, the default, accepts any.
    - `free`: names of `identity` that may differ; none.

    **Raises:** ValueError, with the first difference, for a directory of another run.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int | None = 3,
        identity: dict[str, Any] | None = None,
        free: Sequence[str] = (),
    ):
        self.directory = Path(directory).expanduser().absolute()
        self.identity = json.loads(json.dumps(identity))
        self._keep, self._manager, self._begun = keep, None, None
        self.held = self._held()
        """The identity of the run that is there, None if there is none."""
        if identity is not None and self.held is not None:
            hide = dict.fromkeys(free)
            both = comparable(self.held | hide, self.identity | hide)
            refuse_other(self.directory, "run", *both)

    def _held(self):
        for step in reversed(self.steps()):
            try:
                return self.metadata(step)["identity"]
            except (OSError, ValueError, KeyError):  # damaged: an earlier one tells
                continue
        return None

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints that are there, in order."""
        if not self.directory.is_dir():
            return []
        names = [path.name for path in self.directory.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, step: int, arrays: dict[str, Array]) -> None:
        """Begin to write `arrays` as the checkpoint of `step`, if it is not there.

        Returns when the arrays are copied to the host.

        **Raises:** OSError if this one or the one before it could not be written.
        """
        if step in (self._begun, *self.steps()):
            return
        with self._writing(f"the checkpoint of step {step}"):
            args = orbax().args
            marks = jax.device_get(fingerprint(list(arrays.values())))
            meta = {
                "identity": self.identity,
                "shapes": _describe(arrays),
                "fingerprint": dict(zip(arrays, map(int, marks), strict=True)),
            }
            items = {"state": args.StandardSave(arrays), "meta": args.JsonSave(meta)}
            if self._manager is None:
                self._manager = self._open()
            self._manager.save(step, args=args.Composite(**items), force=True)
            self._begun = step

    def metadata(self, step: int) -> dict[str, Any]:
        """What is saved along with the arrays of `step`: identity and fingerprints."""
        return json.loads(orbax_metadata(self.directory / str(step)))

    def wait(self) -> None:
        """Return when all that was saved is on disk; raises as `save` does."""
        if self._manager is not None:
            with self._writing("a checkpoint"):
                self._manager.wait_until_finished()

    def latest(
        self, like: dict[str, Array] | None
    ) -> tuple[int, dict[str, Array]] | None:
        """(step, arrays as `like`) of the last whole checkpoint; None if there is none.

        Damaged ones after it are renamed to `damaged-STEP`, with a warning.

        **Raises:** ValueError if there are some and none is whole; all of them stay.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                arrays = self.read(step, like)
            except _OtherRunError:
                raise
            except Exception as error:  # whatever a damaged file may lead to
                damaged[step] = first_line(error)
                continue
            for bad, reason in damaged.items():
                self._set_aside(bad, reason, step)
            return step, arrays
        if damaged:
            reasons = (f"step {n} ({reason})" for n, reason in damaged.items())
            raise ValueError(
                f"no checkpoint in {self.directory} can be read: "
                f"{'; '.join(reasons)}. Start the run anew in another directory."
            )
        return None

    def close(self) -> None:
        """Wait for what is being written, and close; raises as `save` does."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with self._writing("a checkpoint"):
                manager.close()

    def _open(self):
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        options = orbax().CheckpointManagerOptions(
            max_to_keep=self._keep,
            create=True,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        return orbax().CheckpointManager(self.directory, options=options)

    def read(self, step: int, like: dict[str, Any] | None = None) -> dict[str, Array]:
        """The arrays of the checkpoint of `step`, compared with their fingerprints.

        Laid out as `like`, or on one device. Raises if it is not whole.
        """
        place, meta = self.directory / str(step), self.metadata(step)
        layout = _shapes(place) if like is None else like
        _refuse_other_state(place, meta["shapes"], _describe(layout))
        abstract = jax.tree.map(orbax().utils.to_shape_dtype_struct, layout)
        with _checkpointer() as checkpointer:
            args = orbax().args
            wanted = args.Composite(state=args.StandardRestore(abstract))
            arrays = checkpointer.restore(place, args=wanted).state
        marks = jax.device_get(fingerprint([arrays[name] for name in layout]))
        for name, mark in zip(layout, marks, strict=True):
            if meta["fingerprint"][name] != int(mark):
                raise ValueError(f"the array {name} is not the one that was saved")
        return {name: arrays[name] for name in layout}

    def _set_aside(self, step, reason, instead):
        place = self.directory / str(step)
        if jax.process_index() == 0:
            aside = self.directory / f"damaged-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            place.rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged-{step}")
        warnings.warn(
            f"the checkpoint of step {step} is damaged ({reason}); it is now called "
            f"damaged-{step}, and that of step {instead} is used.",
            stacklevel=4,
        )

    @contextmanager
    def _writing(self, what):
        """Whatever goes wrong inside becomes an OSError with a sentence."""
        try:
            yield
        except Exception as error:
            whole = self.steps()
            last = f"step {whole[-1]} is" if whole else "none is"
            raise OSError(
                f"{what} could not be written to {self.directory} "
                f"({first_line(error)}). Nothing that was saved is lost: of the whole "
                f"ones {last} the last. Free some space and start the same command "
                "again; it goes on from there."
            ) from error


class _OtherRunError(ValueError):
    """The checkpoint is whole, but of another run."""


def _refuse_other_state(place, saved, wanted):
    if difference := differing(saved, wanted):
        raise _OtherRunError(
            f"the checkpoint at {place} holds another state than the one asked for: "
            f"{difference}. Restore with the network and the optimiser that were saved."
        )


def _describe(arrays):
    """Shape and type of each array, as plain JSON."""
    return {name: f"{a.dtype}{list(a.shape)}" for name, a in arrays.items()}


def _checkpointer():
    ocp = orbax()
    state, meta = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(state=state, meta=meta))


def _shapes(place):
    """Shapes and types of the arrays in `place`, for one device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with _checkpointer() as checkpointer:
        saved = dict(checkpointer.metadata(place).item_metadata.state)
    return {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device)
        for name, a in saved.items()
    }
