"""Pairs of a flow in memory or on disk, with a log of how many are done."""

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ..mesh import to_host
from ..runs.recorder import write_whole


def _checksum(held) -> int:
    """Of arrays and numbers."""
    leaves = jax.tree.leaves(held)
    crc = zlib.crc32(str([leaf for leaf in leaves if np.isscalar(leaf)]).encode())
    for leaf in leaves:
        if isinstance(leaf, jax.Array):
            leaf = to_host(leaf)
        if isinstance(leaf, np.ndarray):
            crc = zlib.crc32(np.ascontiguousarray(leaf), crc)
    return crc


class Log:
    """How many pairs are done; on disk, if the pairs are."""

    def __init__(self, file, what):
        self.file, self.what, self.done, self.evaluations = file, what, 0, -1

    def finish(self, done: int) -> None:
        """Note that the first `done` pairs are there."""
        self.done = done
        if self.file is not None:
            content = {"done": done, "evaluations": self.evaluations, **self.what}
            write_whole(self.file, json.dumps(content) + "\n")


def open_pairs(directory, key, n, shape, batch_size, held):
    """(x0, x1, log): arrays in memory, or those of a directory, new or continued.

    `held` is all that the pairs depend on besides the key.
    """
    dtype = np.dtype(jnp.result_type(float))
    if directory is None:
        x0, x1 = (np.empty((n, *shape), dtype) for _ in range(2))
        return x0, x1, Log(None, {})
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    what = {
        "n": n,
        "shape": list(shape),
        "batch_size": batch_size,
        "dtype": dtype.name,
        "model, start, cond or solver": _checksum(held),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }
    log, old = Log(directory / "pairs.json", what), {}
    if log.file.exists():
        old = json.loads(log.file.read_text())
        log.done, log.evaluations = old.pop("done"), old.pop("evaluations")
        if old != what:
            name = next(k for k in what if old.get(k) != what[k])
            raise ValueError(
                f"{directory} holds pairs of another call: {name} was {old.get(name)}, "
                f"now {what[name]}. Give another directory, or remove it."
            )
    options = {"mode": "r+" if old else "w+", "dtype": dtype, "shape": (n, *shape)}
    files = (directory / f"{name}.npy" for name in ("x0", "x1"))
    return *(np.lib.format.open_memmap(file, **options) for file in files), log
