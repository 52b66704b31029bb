"""A trial: a function (key, **hyperparameters) of arrays, and what it may return.

Either a dict of scalar metrics, or a `Training`, whose loop the sweep then runs, saves
and resumes. All of it is traced once for all trials that share their static values.
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

from ..training import Feed, Fit, fit
from ..training.config import TrainingConfig, configured
from ..typing import PyTree, RandomKey, is_traced
from .space import Space, override


@dataclasses.dataclass(init=False, eq=False)
class Training:
    """What a trial trains: the arguments of `fit`, and how the result is judged.

    The numbers in `model`, `optimizer`, `loss` and `ema` may depend on the trial's
    hyperparameters; data, steps and batch size are the same for all trials of a
    program. "loss", the mean over the last tenth of the steps (at a rung of `Halving`
    over the last call), is always among the metrics.

    **Arguments:**

    - `model`, `config`, `cond`, `loss`, `changes`: see `fit`; `data`, arrays.
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
        return functools.partial(
            Feed,
            self.data,
            self.cond,
            batch_size=self.config.batch_size,
            seed=0,
            mesh=None,
            accumulate=self.config.accumulate,
        )


def bind(trial: Callable, config: Any, static: Mapping[str, Any]) -> Callable:
    """(key, values) -> what `trial` returns, with the static values filled in.

    With a config the trial is called as `trial(key, config)`, with the fields that the
    axes name replaced.
    """

    def bound(key, values):
        both = {**static, **values}
        if config is not None:
            return trial(key, override(config, both))
        return trial(key, **both)

    return bound


def check_names(trial: Callable, config: Any, space: Space) -> None:
    """Refuse axes that are no parameters of the trial."""
    for part in space.parts:
        names = [name for name in part if name != "seed"]
        if config is not None:
            values = {n: None for n in names if "." not in n}
            override(config, values)
            continue
        parameters = inspect.signature(trial).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue
        known = list(parameters)[1:]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"the trial has no parameter {unknown[0]!r}; it has "
                f"{', '.join(known) or 'none but its key'}."
            )


def outcome(trial: Callable, values: Mapping[str, Any], metric: str | None) -> Any:
    """What `trial(key, values)` returns, as shapes: a Training, or a dict of metrics.

    `values` are numbers of one trial.

    **Raises:** ValueError for an axis that cannot be traced, and for metrics that are
    no scalars.
    """
    seen = []

    def run(key, values):
        result = trial(key, values)
        seen.append(result)
        if isinstance(result, Training):
            return _evaluate(result, key)
        return result

    key = jax.random.key(0)
    values = {name: jnp.asarray(np.asarray(value)) for name, value in values.items()}
    try:
        shapes = jax.eval_shape(run, key, values)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError, TypeError) as error:
        _blame(trial, key, values, error)
        raise
    result = seen[-1]
    measured = isinstance(result, Training) and result.measure is not None
    if not measured:
        names = _check_scalars(shapes, isinstance(result, Training))
        check_metric(metric, names)
    return result


def _evaluate(training, key):
    if not callable(training.evaluate):
        return {}
    return training.evaluate(key, training.model)


def _check_scalars(shapes, training):
    what = "evaluate" if training else "the trial"
    if not isinstance(shapes, Mapping):
        raise ValueError(
            f"{what} must return a dict of scalar metrics"
            f"{'' if training else ', or a Training'}, got {shapes!r:.80}."
        )
    for name, shape in shapes.items():
        if getattr(shape, "shape", None) != ():
            raise ValueError(
                f"the metric {name!r} must be a scalar, got shape "
                f"{getattr(shape, 'shape', type(shape).__name__)}. Reduce it, or let "
                "`measure` of a Training do so on the host."
            )
    return [*shapes, *(["loss"] if training else [])]


def check_metric(metric: str | None, names: Sequence[str]) -> None:
    """Refuse a metric that the trials do not have."""
    if metric is not None and metric not in names:
        raise ValueError(
            f"the trials have no metric {metric!r}; they have "
            f"{', '.join(names) or 'none'}."
        )


def _blame(trial, key, values, error):
    """Raise with the name of the axis that cannot be traced, if it is one."""

    def traced(name):
        """What is wrong if only the value of `name` (and the key) are traced."""
        others = {k: v.item() for k, v in values.items() if k != name}

        def alone(key, value):
            result = trial(key, others if name is None else {**others, name: value})
            training = isinstance(result, Training)
            return _evaluate(result, key) if training else result

        try:
            jax.eval_shape(alone, key, values.get(name))
        except (jax.errors.JAXTypeError, jax.errors.JAXIndexError, TypeError) as wrong:
            return wrong
        return None

    wrong = traced(None)
    if isinstance(wrong, jax.errors.JAXTypeError):
        raise ValueError(
            f"the trial cannot be traced whatever its axes are ({_first_line(wrong)}): "
            "make arrays of data outside of it, and keep to JAX on what depends on the "
            "key."
        ) from error
    for name in values if wrong is None else ():
        if (wrong := traced(name)) is not None:
            raise ValueError(
                f"axis {name!r} cannot be traced: the trial needs its value as a "
                f"Python number ({_first_line(wrong)}). Make the axis static, "
                f"{name!r}: Static(...), and each of its values becomes a program of "
                "its own."
            ) from error


def _first_line(error):
    return str(error).strip().splitlines()[0][:120].rstrip(".")
