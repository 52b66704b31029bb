"""A trial: a function (key, **hyperparameters) of arrays, and what it may return.

Either a dict of scalar metrics, or a `Training`, whose loop the sweep then runs. It is
traced once for all trials that share their static values.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..models.units import in_units_of
from ..runs.recorder import first_line
from ..training import Feed, Fit, fit
from ..training.config import TrainingConfig, configured
from ..typing import PyTree, RandomKey, is_traced
from .space import SEED, Space, override


@dataclasses.dataclass(init=False, eq=False)
class Training:
    """What a trial trains: the arguments of `fit`, and how the result is judged.

    The numbers in `model`, `optimizer`, `loss` and `ema` may depend on the trial's
    hyperparameters. "loss", the mean over the last tenth of the steps (at a rung of
    `Halving` over the last call), is always among the metrics.

    **Arguments:**
    - `model`, `config`, `cond`, `loss`, `changes`: see `fit`.
    - `data`: arrays, the same for all trials of a program.
    - `evaluate`: (key, model) -> a pytree, of the averaged model, on the device, for
      all trials together; nothing by default.
    - `measure`: that pytree, of one trial -> metrics, on the host; by default
      `evaluate` gives the metrics itself.
    """

    model: eqx.Module
    data: Array | np.ndarray
    config: TrainingConfig
    cond: PyTree
    loss: Callable | None
    evaluate: Callable[[RandomKey, Any], PyTree] | None
    measure: Callable[[PyTree], Mapping[str, float]] | None

    def __init__(
        self,
        model: eqx.Module,
        data: Array | np.ndarray,
        config: TrainingConfig | None = None,
        *,
        cond: PyTree = None,
        loss: Callable | None = None,
        evaluate: Callable | None = None,
        measure: Callable | None = None,
        **changes: Any,
    ):
        if not is_traced(data):
            model = in_units_of(model, data)
        self.model, self.data, self.cond, self.loss = model, data, cond, loss
        self.evaluate, self.measure = evaluate, measure
        self.config = configured(TrainingConfig, config, changes, "Training")

    def fit(self, **options: Any) -> Fit:
        """The trial alone, by `fit`: what the sweep gives, to rounding."""
        options = {"cond": self.cond, "loss": self.loss} | options
        return fit(self.model, self.data, self.config, **options)

    @property
    def feed(self) -> Callable[[], Feed]:
        """Makes the data of a program, the same for every trial."""
        if is_traced((self.data, self.cond)):
            raise ValueError(
                "the data of a Training must be the same for all trials of a program: "
                "make them outside of the trial, not from its key or hyperparameters."
            )
        config = self.config
        sizes = {"batch_size": config.batch_size, "accumulate": config.accumulate}
        return functools.partial(Feed, self.data, self.cond, seed=0, mesh=None, **sizes)


def bind(trial: Callable, config: Any, static: Mapping[str, Any]) -> Callable:
    """(key, values) -> what `trial` returns, with the `static` values filled in.

    With a `config` the trial is called as `trial(key, config)`, its fields replaced.
    """

    def bound(key, values):
        both = {**static, **values}
        if config is not None:
            return trial(key, override(config, both))
        return trial(key, **both)

    return bound


def check_names(trial: Callable, config: Any, space: Space) -> None:
    """Refuse axes that are no parameters of the trial."""
    parameters = inspect.signature(trial).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = list(parameters)[1:]
    for name in (name for part in space.parts for name in part if name != SEED):
        if config is not None:
            override(config, {} if "." in name else {name: None})
        elif not anything and name not in known:
            raise ValueError(
                f"the trial has no parameter {name!r}; it has "
                f"{', '.join(known) or 'none but its key'}."
            )


_UNTRACEABLE = (jax.errors.JAXTypeError, jax.errors.JAXIndexError, TypeError)


def outcome(trial: Callable, values: Mapping[str, Any], metric: str | None) -> Any:
    """What `trial(key, values)` returns, as shapes: a Training, or a dict of metrics.

    **Arguments:**
    - `trial`: from `bind`.
    - `values`: numbers of one trial.
    - `metric`: that the trials must have, or None.

    **Raises:** ValueError for an axis that cannot be traced, and for metrics that are
    no scalars.
    """
    values = {name: jnp.asarray(np.asarray(value)) for name, value in values.items()}
    try:
        result, shapes = _trace(trial, values)
    except _UNTRACEABLE as error:
        _blame(trial, values, error)
        raise
    trains = isinstance(result, Training)
    if not trains or result.measure is None:
        check_metric(metric, _check_scalars(shapes, trains))
    return result


def _trace(trial, traced, fixed=None):
    """What a trial of `traced` and `fixed` values returns; its metrics as shapes."""
    seen = []

    def run(key, values):
        result = trial(key, {**(fixed or {}), **values})
        seen.append(result)
        if not isinstance(result, Training):
            return result
        return {} if result.evaluate is None else result.evaluate(key, result.model)

    shapes = jax.eval_shape(run, jax.random.key(0), traced)
    return seen[-1], shapes


def _check_scalars(shapes, training):
    what = "evaluate" if training else "the trial"
    if not isinstance(shapes, Mapping):
        raise ValueError(
            f"{what} must return a dict of scalar metrics"
            f"{'' if training else ', or a Training'}, got {shapes!r:.80}."
        )
    for name, metric in shapes.items():
        shape = getattr(metric, "shape", type(metric).__name__)
        if shape != ():
            raise ValueError(
                f"the metric {name!r} must be a scalar, got shape {shape}. Reduce it, "
                "or let `measure` of a Training do so on the host."
            )
    return [*shapes, "loss"] if training else list(shapes)


def check_metric(metric: str | None, names: Sequence[str]) -> None:
    """Refuse a metric that the trials do not have."""
    if metric is not None and metric not in names:
        raise ValueError(
            f"the trials have no metric {metric!r}; they have "
            f"{', '.join(names) or 'none'}."
        )


def _blame(trial, values, error):
    """Raise with the name of the axis that cannot be traced, if it is one."""

    def wrong(name):
        """The error if only the value of `name` (and the key) are traced, or None."""
        fixed = {k: v.item() for k, v in values.items() if k != name}
        traced = {k: v for k, v in values.items() if k == name}
        try:
            _trace(trial, traced, fixed)
        except _UNTRACEABLE as found:
            return found
        return None

    whatever = wrong(None)
    if isinstance(whatever, jax.errors.JAXTypeError):
        raise ValueError(
            "the trial cannot be traced whatever its axes are "
            f"({_short(whatever)}): make arrays of data outside of it, and keep to JAX "
            "on what depends on the key."
        ) from error
    for name in values if whatever is None else ():
        if (found := wrong(name)) is not None:
            raise ValueError(
                f"axis {name!r} cannot be traced: the trial needs its value as a "
                f"Python number ({_short(found)}). Make the axis static, {name!r}: "
                "Static(...), and each of its values becomes a program of its own."
            ) from error


def _short(error):
    return first_line(error)[:120].rstrip(".")
