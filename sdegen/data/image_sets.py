"""Classic image sets from the disk: MNIST, Fashion-MNIST, CIFAR-10; no downloads.

An npz file of a set holds `x_train`, `y_train`, `x_test` and `y_test`.

**Arguments** of each:
- `split`: "train" (the default) or "test".
- `directory`: the folder with one sub-folder per set, default $SDEGEN_DATA.

**Returns:** images (n, h, w, c), uint8, and labels (n,), int32.

**Raises:** `FileNotFoundError` if the files are missing, `ValueError` if they are
damaged.
"""

import functools
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int32, UInt8

from .formats import read_cifar_archive, read_cifar_folder, read_idx, read_npz, reading

Images: TypeAlias = UInt8[np.ndarray, "n h w c"]
Labels: TypeAlias = Int32[np.ndarray, " n"]


def mnist(
    split: str = "train", directory: str | Path | None = None
) -> tuple[Images, Labels]:
    """Handwritten digits 0 to 9: 60,000 (train) or 10,000 (test) images (28, 28, 1).

    255 is ink. In `mnist/` (or torchvision's `MNIST/raw/`): the idx files, with or
    without `.gz`, or `mnist.npz`. Arguments as above. LeCun, Cortes and Burges 1998.
    """
    return _ink("mnist", ("mnist", "MNIST/raw"), split, directory)


def fashion_mnist(
    split: str = "train", directory: str | Path | None = None
) -> tuple[Images, Labels]:
    """Ten classes of clothes, in the sizes and the formats of `mnist`.

    In `fashion-mnist/` (or `FashionMNIST/raw/`), or as `fashion-mnist.npz` there. 0
    T-shirt, 1 trouser, 2 pullover, 3 dress, 4 coat, 5 sandal, 6 shirt, 7 sneaker, 8
    bag, 9 ankle boot. Arguments as above. Xiao, Rasul and Vollgraf 2017.
    """
    folders = ("fashion-mnist", "FashionMNIST/raw")
    return _ink("fashion-mnist", folders, split, directory)


def cifar10(
    split: str = "train",
    directory: str | Path | None = None,
    *,
    cache: str | Path | None = None,
) -> tuple[Images, Labels]:
    """Photographs of ten classes: 50,000 (train) or 10,000 (test) images (32, 32, 3).

    In `cifar10/`, or in the folder itself: `cifar-10-batches-py/`,
    `cifar-10-python.tar.gz`, or `cifar10.npz`. 0 airplane, 1 automobile, 2 bird, 3 cat,
    4 deer, 5 dog, 6 frog, 7 horse, 8 ship, 9 truck. Krizhevsky 2009.

    **Arguments:** as above, and
    - `cache`: a folder for an uncompressed copy (184 MB for both splits), which the
      first call writes and later ones read; default none.
    """
    layouts = {
        ("cifar-10-batches-py",): read_cifar_folder,
        ("cifar-10-python.tar.gz",): read_cifar_archive,
        ("cifar10.npz",): read_npz,
    }
    source, read = _find("cifar10", ("cifar10", "."), layouts, split, directory)
    if cache is None:
        return _checked(source, *read(), size=(32, 32, 3))
    facts = source.stat()  # a name for this size and date of the source
    copy = f"cifar10-{split}-{facts.st_size:x}-{facts.st_mtime_ns:x}.npz"
    copy = Path(cache).expanduser() / copy
    if copy.is_file():
        return _checked(copy, *read_npz(copy, split), size=(32, 32, 3))
    images, labels = _checked(source, *read(), size=(32, 32, 3))
    _write_whole(copy, {f"x_{split}": images, f"y_{split}": labels})
    return images, labels


def _ink(name, folders, split, directory) -> tuple[Images, Labels]:
    """A set in the four files of MNIST, or in an npz file of its own name."""
    stem = {"train": "train", "test": "t10k"}.get(split, "")
    layouts = {
        (f"{stem}-images-idx3-ubyte[.gz]", f"{stem}-labels-idx1-ubyte[.gz]"): _idx_pair,
        (f"{name}.npz",): read_npz,
    }
    source, read = _find(name, folders, layouts, split, directory)
    images, labels = read()
    return _checked(source, images[..., None], labels, size=(28, 28, 1))


def _idx_pair(images, labels, split) -> tuple[np.ndarray, np.ndarray]:
    return read_idx(images), read_idx(labels)


def _find(name, folders, layouts, split, directory) -> tuple[Any, Any]:
    """The first of the layouts that is there in any of the folders, and its reader.

    `layouts` are the functions that read, by the names of their files; "[.gz]" in a
    name may be left out.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}.')
    files = " or ".join(" and ".join(names) for names in layouts)
    given = os.environ.get("SDEGEN_DATA") if directory is None else directory
    if not given:
        raise FileNotFoundError(
            f"where is {name}? Give directory=..., or set the environment variable "
            f"SDEGEN_DATA, to the folder that holds {folders[0]}/ with {files}. "
            "Nothing is downloaded."
        )
    root = Path(given).expanduser()
    # The folder of the set itself must have its name: the files of MNIST and
    # Fashion-MNIST have the same names.
    own = [root] if root.name == folders[0] else []
    places = [*own, *(root / folder for folder in folders)]
    for place, (names, read) in itertools.product(places, layouts.items()):
        both = ([place / n.replace("[.gz]", e) for e in (".gz", "")] for n in names)
        paths = [next(filter(Path.exists, pair), None) for pair in both]
        if all(paths):
            return paths[0], functools.partial(read, *paths, split)
    origin = "SDEGEN_DATA" if directory is None else "directory"
    wrong = "" if root.is_dir() else ", which is no folder"
    raise FileNotFoundError(
        f"{name} ({split}) is not there: {origin} is {root}{wrong}. Looked for "
        f"{files}, in {', '.join(map(str, places))}. Put the files into one of these; "
        "nothing is downloaded."
    )


def _checked(source, images, labels, size) -> tuple[Images, Labels]:
    with reading(source, f"images of {size} with as many labels from 0 to 9"):
        if images.dtype != np.uint8 or images.shape[1:] != size or not len(images):
            raise ValueError(f"found {images.dtype} {images.shape}")
        if labels.size != len(images) or labels.dtype.kind not in "iu":
            found = f"{len(images)} images and {labels.size} labels of {labels.dtype}"
            raise ValueError(f"found {found}")
        if labels.min() < 0 or labels.max() > 9:
            raise ValueError(f"labels {labels.min()} to {labels.max()}")
    return np.ascontiguousarray(images), labels.reshape(-1).astype(np.int32)


def _write_whole(path, arrays):
    """Write an npz file that is complete or absent, whoever else writes it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder, path.name)
        np.savez(whole, **arrays)
        os.replace(whole, path)
