"""Sources of single samples on disk: folders of images, ArrayRecord files.

Many threads may read a source at once, and it may be sent to other processes.
"""

import dataclasses
import importlib
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import UInt8

from .._compat import need
from .formats import reading

_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm"))
_MODES = {"RGB": 3, "L": 1}


class ImageFolder:
    """Images in sub-folders, one for each class, with the class as label.

    Item i is (uint8 image (size, size, channels), int label). `classes` are the sorted
    names of the sub-folders; files, at any depth, are sorted by path. The largest
    central square is averaged down to `size` pixels (Pillow's box filter; a smaller
    image is enlarged by the nearest pixel). Rotations in metadata are not applied.

    **Arguments:**
    - `path`: the folder of the sub-folders.
    - `size`: pixels along a side.
    - `mode`: "RGB" (3 channels, the default) or "L" (1 channel, luma).

    **Raises:** `FileNotFoundError` without images, `ValueError` in the place of an
    image that cannot be read.
    """

    def __init__(self, path: str | Path, size: int, mode: str = "RGB"):
        _pillow()
        if size < 1 or mode not in _MODES:
            raise ValueError(
                f'ImageFolder needs size >= 1 and mode "RGB" or "L", got {size} and '
                f"{mode!r}."
            )
        self.path, self.size, self.mode = Path(path).expanduser(), size, mode
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"{self.path} is no folder. ImageFolder takes a folder with one "
                "sub-folder of images for each class."
            )
        folders = sorted(p for p in self.path.iterdir() if p.is_dir())
        folders = [p for p in folders if not p.name.startswith(".")]
        self.classes = tuple(p.name for p in folders)
        # Text: for a million files, Path objects would be 300 MB more.
        found = [_images_in(folder) for folder in folders]
        self._files = tuple(itertools.chain(*found))
        if not self._files:
            names, endings = ", ".join(self.classes), ", ".join(sorted(_SUFFIXES))
            raise FileNotFoundError(
                f"there are no images in {self.path} (sub-folders: {names or 'none'}; "
                f"endings: {endings}). Images without classes go into one sub-folder."
            )
        counts = [len(files) for files in found]
        self.labels = np.repeat(np.arange(len(found), dtype=np.int32), counts)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(
        self, index: SupportsIndex
    ) -> tuple[UInt8[np.ndarray, "size size channels"], int]:
        """The image and the label of one file."""
        return self._read(self._files[index]), int(self.labels[index])

    def __repr__(self) -> str:
        return (
            f"ImageFolder({str(self.path)!r}, size={self.size}, mode={self.mode!r}, "
            f"{len(self)} images of {len(self.classes)} classes)"
        )

    def _read(self, file):
        pillow = _pillow()
        with reading(file, "an image"), pillow.open(file) as image:
            if image.mode.startswith(("I", "F")):
                # Pillow would clip more than 8 bits to white.
                raise ValueError(f"its pixels have more than 8 bits: {image.mode}")
            image = image.convert(self.mode)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square, size = (left, top, left + side, top + side), (self.size, self.size)
        image = image.resize(size, pillow.Resampling.BOX, box=square)
        return np.asarray(image).reshape(*size, _MODES[self.mode])


@dataclasses.dataclass(frozen=True)
class Decoded:
    """The source whose item i is `decode(source[i])`."""

    source: Any
    decode: Callable[[Any], Any]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex) -> Any:
        return self.decode(self.source[index])


def array_records(
    paths: str | Path | Sequence[str | Path], decode: Callable[[bytes], Any]
) -> Decoded:
    """The records of ArrayRecord files (https://github.com/google/array_record).

    **Arguments:**
    - `paths`: one file or several; read fastest if written with `group_size:1`.
    - `decode`: from the bytes of a record to `x` or `(x, cond)`.

    **Returns:** a source with the decoded records, in the order of `paths`.

    **Raises:** `FileNotFoundError` for missing files, `ImportError` without the
    package array_record, which comes with Grain.
    """
    module = "array_record.python.array_record_data_source"
    reader = need(module, "array_records", extra="data").ArrayRecordDataSource
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    files = [os.fspath(path) for path in given]
    # array_record finds names with a scheme (gs://).
    missing = [f for f in files if "://" not in f and not Path(f).is_file()]
    if missing or not files:
        raise FileNotFoundError(
            f"no ArrayRecord file at {', '.join(missing) or 'all: the list is empty'}."
        )
    return Decoded(reader(files), decode)


def _images_in(folder):
    return sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in _SUFFIXES and not name.startswith(".")
    )


def _pillow():
    need("PIL", "an image folder", extra="data", package="pillow")
    return importlib.import_module("PIL.Image")
