"""What a sweep runs over: axes, their product, and the jobs that it falls into.

A space is a dict from the name of a hyperparameter to its values:

    {
        "process": Static(vp=VP(), edm=EDM()),
        "optimizer.learning_rate": [1e-3, 3e-3],
        "seed": range(5),
    }

Trials that differ in numbers alone are one program, in which these are traced. `Static`
values (a process, a width, a batch size) make another program each. `Between` is a
range to draw from. The axis "seed" is the trial's key. A list of spaces is their union.
"""

import dataclasses
import itertools
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..runs.recorder import describe, is_number

SEED = "seed"


class Static:
    """Values of an axis that cannot be numbers in a program: one program for each.

    **Arguments:**
    - `values`: `Static(64, 128)`, called by their text, or their class if they are
      objects.
    - `named`: values with names for tables, `Static(vp=VP(), edm=EDM())`.
    """

    def __init__(self, *values: Any, **named: Any):
        labels = [_label(value) for value in values] + list(named)
        twice = {label for label in labels if labels.count(label) > 1}
        if twice:
            raise ValueError(
                f"two values of a Static axis are both called {min(twice)!r}: give "
                "them names, as in Static(small=VP(), large=VP(beta_max=30.0))."
            )
        self.values = dict(zip(labels, (*values, *named.values()), strict=True))

    def __repr__(self):
        return f"Static({', '.join(self.values)})"


@dataclasses.dataclass(frozen=True)
class Between:
    """A range of numbers to draw from.

    **Arguments:**
    - `low`, `high`: the ends.
    - `log`: draw evenly in the logarithm; by default in the number.
    """

    low: float | int
    high: float | int
    log: bool = False

    def __post_init__(self):
        fine = math.isfinite(self.low) and math.isfinite(self.high)
        if not (fine and self.low < self.high) or (self.log and self.low <= 0):
            raise ValueError(
                f"a range has finite low < high, and low > 0 with log=True, got {self}."
            )

    def draw(self, u: float) -> float:
        """The number at share `u` of the range."""
        if self.log:
            return float(self.low * (self.high / self.low) ** u)
        return float(self.low + (self.high - self.low) * u)


@dataclasses.dataclass(frozen=True)
class Point:
    """One trial: its number, its traced values, its static labels, its seed."""

    number: int
    values: Mapping[str, float | int]
    static: Mapping[str, str]
    seed: int

    @property
    def row(self) -> dict[str, Any]:
        """The trial as columns of a table."""
        return {"trial": self.number, **self.static, **self.values, SEED: self.seed}


@dataclasses.dataclass(frozen=True)
class Job:
    """Trials that are one program: they share their static values."""

    number: int
    static: Mapping[str, Any]
    points: tuple[Point, ...]


class Space:
    """Axes, checked, and the union of their products as numbered trials.

    **Arguments:**
    - `axes`: a dict from names to values, or a list of such dicts.
    """

    def __init__(self, axes: Mapping[str, Any] | Sequence[Mapping[str, Any]]):
        parts = [axes] if isinstance(axes, Mapping) else list(axes)
        if not parts or not all(isinstance(part, Mapping) for part in parts):
            raise ValueError(
                "a space is a dict from names to values, or a list of such dicts, got "
                f"{axes!r:.80}."
            )
        self.parts = [{n: _axis(n, v) for n, v in part.items()} for part in parts]
        if not all(self.parts):
            raise ValueError('the space is empty: add an axis, as {"seed": range(5)}.')

    def grid(self) -> list[Point]:
        """Every trial, seeds fastest; ValueError where an axis is a range."""
        axes = itertools.chain(*(part.items() for part in self.parts))
        for name, values in axes:
            if isinstance(values, Between):
                raise ValueError(
                    f"axis {name!r} is a range: say how many points are to be drawn "
                    "(trials=50, or --trials 50), or list its values."
                )
        return self._points(
            itertools.product(*map(_labels, part.values()))
            for part in map(_without_seed, self.parts)
        )

    def draw(self, n: int, seed: int = 0) -> list[Point]:
        """`n` points drawn from the space, each with every seed: random search."""
        random, drawn = np.random.default_rng(seed), [[] for _ in self.parts]

        def pick(axis):
            if isinstance(axis, Between):
                return axis.draw(random.uniform())
            return _labels(axis)[random.integers(len(_labels(axis)))]

        for i in range(n):
            part = i % len(self.parts)
            axes = _without_seed(self.parts[part]).values()
            drawn[part].append([pick(axis) for axis in axes])
        return self._points(drawn)

    def _points(self, products):
        points = []
        for part, product in zip(self.parts, products, strict=True):
            names = list(_without_seed(part))
            for chosen, seed in itertools.product(product, part.get(SEED, [0])):
                both = dict(zip(names, chosen, strict=True))
                points.append(as_point(part, len(points), both, seed))
        return points

    def jobs(self, points: Sequence[Point], chunk: int | None = None) -> list[Job]:
        """The programs that `points` need, each of at most `chunk` trials."""
        groups: dict[str, list[Point]] = {}
        for point in points:
            # Points of one program have the same traced names, too.
            mark = json.dumps([point.static, sorted(point.values)], sort_keys=True)
            groups.setdefault(mark, []).append(point)
        jobs = []
        for group in groups.values():
            size = chunk or len(group)
            for start in range(0, len(group), size):
                some = tuple(group[start : start + size])
                jobs.append(Job(len(jobs), self.static_values(some[0]), some))
        return jobs

    def static_values(self, point: Point) -> dict[str, Any]:
        """The objects that a point's static labels stand for."""
        for part in self.parts:
            axes = {k: v.values for k, v in part.items() if isinstance(v, Static)}
            traced = set(part) - {SEED, *axes}
            if axes.keys() == point.static.keys() and traced == set(point.values):
                if all(label in axes[k] for k, label in point.static.items()):
                    return {k: axes[k][label] for k, label in point.static.items()}
        raise ValueError(f"the space has no point {point.row}.")

    def describe(self) -> Any:
        """The space as plain JSON, for the identity of a sweep."""

        def plain(values):
            return {"static": values.values} if isinstance(values, Static) else values

        return describe([{k: plain(v) for k, v in p.items()} for p in self.parts])


def as_point(part: Mapping, number: int, chosen: Mapping, seed: int) -> Point:
    """The point of a part of a space with the `chosen` values, labels where static."""
    static = {k: v for k, v in chosen.items() if isinstance(part[k], Static)}
    values = {k: v for k, v in chosen.items() if k not in static}
    return Point(number, values, static, seed)


def _axis(name, values):
    """The values of an axis, checked."""
    if isinstance(values, Static | Between):
        if name == SEED:
            raise ValueError('the axis "seed" is a list of whole numbers.')
        empty = isinstance(values, Static) and not values.values
    else:
        if isinstance(values, str) or not hasattr(values, "__iter__"):
            raise ValueError(
                f"axis {name!r} needs a list of values, got {values!r:.60}. One value "
                "belongs into the base config."
            )
        values = [v.item() if isinstance(v, np.generic) else v for v in values]
        odd = [v for v in values if not is_number(v)]
        if odd:
            raise ValueError(
                f"axis {name!r} holds {odd[0]!r:.60}, which cannot be traced: make the "
                f"axis static, {name!r}: Static(...), and each of its values becomes a "
                "program of its own."
            )
        if name == SEED and not all(isinstance(v, int) and v >= 0 for v in values):
            raise ValueError(f"seeds are whole numbers >= 0, got {values!r:.80}.")
        if not all(math.isfinite(v) for v in values):
            raise ValueError(f"axis {name!r} must be finite, got {values!r:.80}.")
        if len(set(values)) < len(values):
            raise ValueError(f"axis {name!r} holds a value twice: {values!r:.80}.")
        empty = not values
    if empty:
        raise ValueError(f"axis {name!r} is empty: give it at least one value.")
    return values


def _labels(axis):
    return list(axis.values) if isinstance(axis, Static) else axis


def _without_seed(part):
    return {name: values for name, values in part.items() if name != SEED}


def _label(value):
    """A class or a function by its name, plain values by their text."""
    if isinstance(value, str | numbers.Number):
        return str(value)
    return getattr(value, "__name__", type(value).__name__)


def override(config: Any, values: Mapping[str, Any]) -> Any:
    """`config` with the fields that dotted names lead to replaced.

    **Arguments:**
    - `config`: a dataclass.
    - `values`: as {"optimizer.learning_rate": 1e-3}; may be traced.
    """
    # Shorter names first: an optimiser, then its rate.
    for name in sorted(values, key=lambda name: name.count(".")):
        config = _replace(config, name, values[name], name)
    return config


def _replace(config, path, value, name):
    first, _, rest = path.partition(".")
    if not dataclasses.is_dataclass(config):
        raise ValueError(
            f"axis {name!r}: {first!r} is looked for in {config!r:.60}, which has no "
            "fields."
        )
    known = [field.name for field in dataclasses.fields(config)]
    if first not in known:
        raise ValueError(
            f"axis {name!r}: {type(config).__name__} has no field {first!r}; it has "
            f"{', '.join(known)}."
        )
    if rest:
        value = _replace(getattr(config, first), rest, value, name)
    return dataclasses.replace(config, **{first: value})
