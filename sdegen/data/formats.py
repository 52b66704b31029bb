"""File formats of the classic image sets: idx, npz, CIFAR's pickled batches.

Readers raise a ValueError for a file that is damaged or of another kind.
"""

import contextlib
import gzip
import io
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR_BATCHES = {"train": _TRAIN, "test": ("test_batch",)}
"""The files of each split."""


@contextlib.contextmanager
def reading(path: Path | str, expected: str) -> Iterator[None]:
    """What goes wrong inside, said as a sentence about the file."""
    try:
        yield
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(
            f"{path} cannot be read as {expected} ({kind}{error}): it is truncated, "
            "damaged or another kind of file. Copy or download it again, or remove it."
        ) from error


def read_idx(path: Path) -> UInt8[np.ndarray, "..."]:
    """The array of an idx file of bytes, of any number of axes; `.gz` is unpacked.

    Two zero bytes, the type (8 is uint8), the number of axes, then the axes as
    big-endian 32-bit integers, then the values (LeCun et al., the MNIST page, 1998).
    """
    with reading(path, "an idx file of bytes"):
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        magic = data[:4]
        if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not magic[3]:
            raise ValueError(f"magic number {magic.hex()}, not 000008xx")
        head = 4 + 4 * magic[3]
        if len(data) < head:
            raise ValueError(f"it ends after {len(data)} bytes")
        shape = tuple(int(n) for n in np.frombuffer(data, ">u4", magic[3], 4))
        promised = int(np.prod(shape, dtype=object))
        if len(data) - head != promised:
            found = f"{promised} values of shape {shape}, {len(data) - head} follow"
            raise ValueError(f"the header promises {found}")
        return np.frombuffer(data, np.uint8, offset=head).reshape(shape).copy()


def read_npz(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(`x_<split>`, `y_<split>`) of an npz file; nothing else in it is read."""
    x, y = f"x_{split}", f"y_{split}"
    with reading(path, f"an npz file with the arrays {x} and {y}"):
        with np.load(path, allow_pickle=False) as archive:
            if not {x, y} <= set(archive.files):
                raise ValueError(f"it holds {sorted(archive.files)}")
            return archive[x], archive[y]


def read_cifar_folder(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a split from the unpacked `cifar-10-batches-py`."""
    files = [folder / name for name in CIFAR_BATCHES[split]]
    found = {file.name: file.read_bytes() for file in files if file.is_file()}
    return _cifar(folder, split, found)


def read_cifar_archive(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The same from `cifar-10-python.tar.gz`; nothing is unpacked to disk."""
    found = {}
    with reading(path, "a .tar.gz archive"), tarfile.open(path, "r|gz") as archive:
        for member in archive:
            name = Path(member.name).name
            if name in CIFAR_BATCHES[split] and member.isfile():
                found[name] = archive.extractfile(member).read()
    return _cifar(path, split, found)


def _cifar(place, split, found) -> tuple[np.ndarray, np.ndarray]:
    """The batches of a split, joined, from the bytes of the files that were found."""
    names = CIFAR_BATCHES[split]
    missing = [name for name in names if name not in found]
    if missing:
        raise FileNotFoundError(
            f"{place} lacks {', '.join(missing)}: CIFAR-10's Python version has "
            "data_batch_1 to data_batch_5 and test_batch. Unpack or download it again."
        )
    batches = [_cifar_batch(f"{place}/{name}", found[name]) for name in names]
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _cifar_batch(place, data) -> tuple[np.ndarray, np.ndarray]:
    """One pickled dictionary: `data` (n, 3072), channels first, and n `labels`."""
    with reading(place, "a batch of CIFAR-10's Python version"):
        batch = _CIFARUnpickler(io.BytesIO(data), encoding="bytes").load()
        images, labels = batch[b"data"], np.asarray(batch[b"labels"])
        right = isinstance(images, np.ndarray) and images.shape == (len(labels), 3072)
        if not right or images.dtype != np.uint8:
            raise ValueError("its data are not (n, 3072) bytes, with labels")
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _bytes_dtype(name, *_) -> np.dtype:
    if name not in (b"u1", "u1"):
        raise pickle.UnpicklingError(f"an array of {name!r}, not of bytes")
    return np.dtype(np.uint8)


_CONSTRUCTORS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _bytes_dtype,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: np.ndarray((0,), np.uint8),
}
"""All that a batch of CIFAR asks for. NumPy has since renamed the third."""


class _CIFARUnpickler(pickle.Unpickler):
    """Reads arrays of bytes, lists, strings and numbers, and runs no other function."""

    def find_class(self, module, name):
        if (module, name) not in _CONSTRUCTORS:
            found = f"{module}.{name}, which no batch of CIFAR-10 does"
            raise pickle.UnpicklingError(f"it asks for {found}; it was not run")
        return _CONSTRUCTORS[module, name]
