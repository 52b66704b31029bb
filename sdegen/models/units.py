"""What a model believes of the scale of its data, and what the data say."""

import dataclasses
import warnings
from typing import Any

import numpy as np

from ..processes.momentum import AbstractBlockSDE
from ..processes.normaliser import Normaliser
from ..processes.path import basis_of
from ..typing import is_traced
from .denoiser import Denoiser
from .vdm import VDM

_ROWS = 10_000  # of the data, that the comparison looks at
_FACTOR = 3.0


def in_units_of(model: Any, data: Any) -> Any:
    """`model` in the units of the data, if it was not told their deviation.

    A process with auxiliary rows keeps the units of the data and learns their deviation
    alone. A model that was told one is compared with the data.

    **Arguments:**
    - `model`: a `Denoiser` or a `VDM`; any other model comes back as it is.
    - `data`: floating-point data, (n, ...), at least two axes, or images of bytes.
    """
    if not isinstance(model, Denoiser | VDM) or data.dtype == np.uint8:
        return model  # images of bytes are in [-1, 1], by convention
    if model.sigma_data is not None:
        compare(model, data)
        return model
    if isinstance(model.path, AbstractBlockSDE):
        scale = Normaliser.of(data, per_coordinate=False).scale
        return dataclasses.replace(model, sigma_data=scale) if scale > 0 else model
    return model.normalise(Normaliser.of(data))


def told_units(model: Any) -> dict[str, Any]:
    """The units that `in_units_of` gave to a model, as plain JSON; {} if none."""
    if not isinstance(model, Denoiser | VDM) or model.sigma_data is None:
        return {}
    if model.normaliser is None:
        return {"sigma_data": np.asarray(model.sigma_data).tolist()}
    units = {"shift": model.normaliser.shift, "scale": model.normaliser.scale}
    return {name: np.asarray(value).tolist() for name, value in units.items()}


def with_units(model: Any, told: dict[str, Any]) -> Any:
    """`model` in units that `told_units` has written, if it was not told any."""
    if not isinstance(model, Denoiser | VDM) or model.sigma_data is not None:
        return model
    if "shift" in told:
        return model.normalise(Normaliser(np.array(told["shift"]), told["scale"]))
    return dataclasses.replace(model, **told)


def compare(model: Any, data: Any) -> None:
    """Warn where data and `model.data_scale` differ by more than a factor of three."""
    if not isinstance(model, Denoiser | VDM) or is_traced(model):
        return
    x = np.asarray(data[:_ROWS], np.float32)
    u = np.asarray(basis_of(model.path).coordinates(x), np.float64)
    believed, mean, std = float(model.overall_sigma_data), u.mean(), u.std()
    far = np.sqrt(np.mean(u**2))
    if far > _FACTOR * believed or std * _FACTOR < believed:
        units = " in the units of its Normaliser" if model.normaliser else ""
        warnings.warn(
            f"the data have the mean {mean:.3g} and the standard deviation {std:.3g}"
            f"{units}, and the model believes in mean 0 and sigma_data={believed:.3g}. "
            "Give `fit` an array and no sigma_data: it then measures the data. Or give "
            "the model their units, model.normalise(sdegen.Normaliser.of(some)).",
            stacklevel=4,
        )
