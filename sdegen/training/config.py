"""How a model is trained: one frozen object for `fit`, sweeps and the shell."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from ..typing import is_whole
from .ema import DECAY
from .optimizer import AdamW, Lion

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained; each field may also be given to `fit` by its name.

    As a field of an experiment's config it is a block of flags, `--training.steps 500`.
    """

    steps: int = 10_000
    """Optimisation steps."""
    batch_size: int = 128
    """Samples of a step, over all devices."""
    seed: int = 0
    """Of the batches, times, noise and augmentation."""
    optimizer: AdamW | Lion | Any = dataclasses.field(default_factory=AdamW)
    """An optimiser of `sdegen.training.optimizer`, or any Optax transformation."""
    ema: Any = DECAY
    """A decay, an average of `sdegen.ema`, or a list of either; the first is used. None
    or [] is no average: the weights that are trained are used."""
    augment: Callable | None = None
    """(key, x) -> x on one sample, before bytes become floats; none."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, in less memory."""
    steps_per_call: int = 50
    """Steps of one compiled call; the run is saved and looked at between calls."""
    save_every: int | None = None
    """Steps between checkpoints, in `directory`; twenty checkpoints by default."""
    keep: int | None = 3
    """Checkpoints kept, the last ones; None keeps all."""
    snapshot_every: int | None = None
    """Steps between snapshots of power-function averages; 32 snapshots by default."""
    watch_every: int | None = None
    """Steps between calls of `watch`; ten calls by default."""
    validate_every: int | None = None
    """Steps between looks at the loss on `validation`; twenty looks by default."""
    patience: int | None = None
    """Looks without a new least held-out loss after which training ends; never."""
    stop: Callable | None = None
    """Ends training when it is true of {step: held-out loss}, at every look; none."""

    def __post_init__(self):
        if not is_whole(self.seed, -np.inf):
            raise ValueError(f"seed is a whole number such as 0, got {self.seed!r}.")
        if self.steps < 1 or self.steps_per_call < 1:
            raise ValueError(
                f"fit needs steps >= 1 and steps_per_call >= 1, got {self.steps} and "
                f"{self.steps_per_call}."
            )


def configured(
    kind: type[Config], config: Any, changes: Mapping[str, Any], caller: str
) -> Config:
    """`config`, or the default `kind()`, with the fields that `changes` names replaced.

    **Raises:** TypeError for a name that is no field; it says which is the nearest.
    """
    if not isinstance(config, kind | None):
        raise TypeError(
            f"the config of {caller} is a {kind.__name__}, got {config!r:.60}. Give "
            f"{kind.__name__}(...), or its fields by name."
        )
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore
    for name in changes.keys() - set(known):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
        raise TypeError(
            f"{caller} has no argument {name!r}, and {kind.__name__} no such field. "
            f"{hint}"
        )
    return dataclasses.replace(config or kind(), **changes)  # type: ignore
