"""Training states on disk, through Orbax."""

from pathlib import Path
from typing import TypeVar

import jax
import orbax.checkpoint as ocp

State = TypeVar("State")


def _named(tree) -> dict:
    """The arrays of `tree` by their place in it, a structure that Orbax knows."""
    return {jax.tree_util.keystr(k): v for k, v in jax.tree.leaves_with_path(tree)}


def save(directory: str | Path, state) -> Path:
    """Write the arrays of `state` to `directory`, which must not exist; returns it.

    Orbax writes next to it and renames at the end, so it is whole or absent.
    """
    directory = Path(directory).absolute()
    if directory.exists():
        raise FileExistsError(
            f"{directory} exists already; nothing was written. Save to a new directory."
        )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, _named(state))
    return directory


def restore(directory: str | Path, like: State) -> State:
    """The state saved in `directory`, with the structure and shardings of `like`."""
    directory = Path(directory).absolute()
    if not directory.is_dir():
        raise FileNotFoundError(f"no checkpoint at {directory}.")
    target = _named(like)
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
