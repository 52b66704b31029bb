"""Where else the rows of a run may go: TensorBoard, Weights & Biases, trackio.

A `Recorder` hands every row to each of its writers.
"""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .._compat import need
from .recorder import describe


class Writer(Protocol):
    """What a `Recorder` asks of a writer."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """The numbers of one row."""

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture, (h, w, 3) uint8."""

    def close(self) -> None:
        """Write what is pending."""


class TensorBoard:
    """Event files under DIRECTORY/tensorboard, through tensorboardX."""

    def __init__(self, directory: str | Path, config: Any = None):
        module = need("tensorboardX", "TensorBoard", extra="log")
        place = Path(directory).expanduser() / "tensorboard"
        self._writer = module.SummaryWriter(str(place))

    def scalars(self, step, values):
        """The numbers of one row."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step, name, image):
        """A picture, (h, w, 3) uint8."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self):
        """Write what is pending."""
        self._writer.close()


class _Tracker:
    """Weights & Biases' interface, which trackio shares."""

    def __init__(self, directory, config, module, **options):
        self._module, name = module, Path(directory).expanduser().absolute().name
        module.init(project="sdegen", name=name, config=describe(config), **options)

    def scalars(self, step, values):
        self._module.log(dict(values), step=step)

    def image(self, step, name, image):
        self._module.log({name: self._module.Image(image)}, step=step)

    def close(self):
        self._module.finish()


class Wandb(_Tracker):
    """Weights & Biases; WANDB_MODE=offline needs no account."""

    def __init__(self, directory: str | Path, config: Any = None):
        module = need("wandb", "Weights & Biases")
        # The same directory is the same run, also when it goes on.
        place = str(Path(directory).expanduser().absolute())
        name = hashlib.sha1(place.encode()).hexdigest()[:16]
        options = {
            "dir": str(Path(directory).expanduser()),
            "resume": "allow",
            "id": name,
        }
        super().__init__(directory, config, module, **options)


class Trackio(_Tracker):
    """trackio: a local board, no account and no server."""

    def __init__(self, directory: str | Path, config: Any = None):
        module = need("trackio", "the local board")
        super().__init__(directory, config, module, resume="allow")


KINDS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
"""The writers by the names that a command line takes."""
