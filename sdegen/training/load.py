"""A trained model from the directory of its run, without its data or optimiser."""

import json
from pathlib import Path
from typing import Any

from ..models.model import AbstractModel
from ..models.units import with_units
from ..runs import checkpoint
from ..runs.identity import identify, without_code
from ..runs.recorder import differing
from .optimizer import like_dtypes
from .step import check_model


def load(
    directory: str | Path, model: AbstractModel, *, average: int | None = 0
) -> Any:
    """The model of the run that `fit(..., directory=)` saved, at its last checkpoint.

    `fit(load(run, model), data, directory=another)` trains it further as a new run.

    **Arguments:**
    - `directory`: of the run.
    - `model`: the model before training, or one like it: the same process and numbers,
      and a network of the same shape, whose weights are replaced. The units of the data
      that `fit` measured are the run's.
    - `average`: the number of the average among those of `ema`, 0 for the first, which
      `Fit.model` has too (the weights themselves in a run without averages); None for
      the weights that were trained themselves.

    **Raises:** FileNotFoundError where nothing is; ValueError for what is no run, for a
    run of another model and for an average that it does not have.
    """
    check_model(model)
    place = Path(directory).expanduser().absolute()
    kept = checkpoint.Checkpoints(_checkpoints(place), keep=None)
    found = kept.latest(None)
    if found is None:
        raise ValueError(
            f"the run in {place} has no checkpoint yet. Wait for its first one, after "
            "`save_every` steps."
        )
    step, arrays = found
    if (file := place / "units.json").exists():
        model = with_units(model, json.loads(file.read_text()))
    held = (kept.metadata(step)["identity"] or {}).get("model")
    own = identify(model.with_trained(None))
    # A class may have got new methods since.
    if text := differing(without_code(held), without_code(own), "model"):
        raise ValueError(
            f"{place} holds a run of another model: {text}. Give the model that was "
            "trained, with the same process and numbers."
        )
    parts = {name.split("]")[0] for name in arrays if name.startswith(".averages[")}
    if average == 0 and not parts:
        average = None
    if average is not None and not 0 <= average < len(parts):
        raise ValueError(
            f"the run in {place} keeps {len(parts)} averages, got average={average}. "
            "Take a smaller one, or None for the weights that were trained."
        )
    prefix = ".trained" if average is None else f".averages[{average}]"
    arrays = {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
    wanted = checkpoint.named(model.trained)
    both = (arrays, wanted)
    shapes = [{f"network{k}": list(v.shape) for k, v in d.items()} for d in both]
    if text := differing(*shapes):
        raise ValueError(
            f"{place} holds a run of another network: {text}. Make the network with "
            "the settings that it was trained with."
        )
    trained = checkpoint.unnamed(arrays, model.trained)
    return model.with_trained(like_dtypes(trained, model.trained))


def _checkpoints(place):
    """The folder of checkpoints of the run at `place`, or a sentence."""
    if not place.exists():
        raise FileNotFoundError(f"there is no run at {place}: nothing is there.")
    if not place.is_dir():
        raise ValueError(
            f"{place} is a file. A run is a directory: that of fit(directory=...)."
        )
    inside = sorted(path.name for path in place.iterdir())
    if "checkpoints" in inside:
        return place / "checkpoints"
    runs = [up for up in place.parents if (up / "checkpoints").is_dir()][:1]
    if runs:
        raise ValueError(f"{place} is a part of a run: give the run, {runs[0]}.")
    what = f"holds {', '.join(inside[:4])}" if inside else "is empty"
    raise ValueError(
        f"{place} holds no run: it {what}, and a run has a folder `checkpoints`. Give "
        "the directory that fit(directory=...) had."
    )
