"""The picture of a sweep: its metric against each axis, and parallel coordinates."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._compat import need
from .plots import new_figure, save
from .recorder import is_number


def sweep_plot(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    axes: Sequence[str],
    metric: str,
) -> Path:
    """The metric against each axis, and all axes as parallel coordinates.

    A line in a panel joins the best points at each value of the axis.

    **Arguments:**
    - `rows`: points of the space, with the mean of `metric` over seeds and its standard
      error under "METRIC se".
    - `axes`: the names of what was varied.
    - `metric`: what is drawn; small is good.
    """
    rows = [row for row in rows if np.isfinite(row[metric])]
    axes = [a for a in axes if len({str(row.get(a)) for row in rows}) > 1]
    wide = max(len(axes), 1)
    figure = new_figure(max(3.0 * wide, 5.0), 6.4)
    top, bottom = figure.subfigures(2, 1)
    values = np.array([row[metric] for row in rows])
    colour = _colours(values)
    limits = _limits(values)
    for axis, name in zip(np.atleast_1d(top.subplots(1, wide)), axes, strict=False):
        x, ticks, log = _positions([row.get(name) for row in rows])
        errors = np.array([row[f"{metric} se"] for row in rows])
        errors = np.where(np.isnan(errors), 0.0, errors)  # one seed has no error bar
        axis.errorbar(x, values, errors, fmt="none", ecolor="0.8", linewidth=1)
        axis.scatter(x, values, c=colour, s=14, zorder=3)
        places = sorted(set(x))
        axis.plot(places, [min(values[x == p]) for p in places], color="0.4", zorder=2)
        if log:
            axis.set_xscale("log")
        if ticks is not None:
            axis.set_xticks(range(len(ticks)), ticks, fontsize=8)
            axis.set_xlim(-0.5, len(ticks) - 0.5)
        axis.set(xlabel=name, ylim=limits)
        if limits[0] > 0 and limits[1] > 20 * limits[0]:
            axis.set_yscale("log")
    figure.axes[0].set_ylabel(metric)
    _parallel(bottom.subplots(), rows, axes, metric, values, colour, limits)
    return save(figure, path)


def _parallel(axis, rows, axes, metric, values, colour, limits):
    """Parallel coordinates: a line for each point, coloured by its metric."""
    columns, labels = [], []
    for name in axes:
        x, ticks, log = _positions([row.get(name) for row in rows])
        ends = [f"{min(x):g}", f"{max(x):g}"]
        labels.append(ends if ticks is None else [ticks[0], ticks[-1], *ticks[1:-1]])
        x = np.log(x) if log else x
        columns.append((x - min(x)) / (max(x) - min(x)))
    columns.append((np.clip(values, *limits) - limits[0]) / (limits[1] - limits[0]))
    labels.append([f"{limits[0]:.3g}", f"{limits[1]:.3g}"])
    lines = np.stack(columns, 1)
    for i in np.argsort(-values):  # the best on top
        axis.plot(lines[i], color=colour[i], linewidth=1, alpha=0.8)
    for i, (low, high, *between) in enumerate(labels):
        for k, name in enumerate(between, 1):
            y = k / (len(between) + 1)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
            axis.text(i + 0.02, y, name, va="center", fontsize=8, zorder=4, bbox=box)
        axis.axvline(i, color="0.7", linewidth=0.8, zorder=0)
        axis.text(i, -0.04, low, ha="center", va="top", fontsize=8)
        axis.text(i, 1.04, high, ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(labels)), [*axes, metric])
    axis.tick_params(axis="x", pad=14, length=0)
    axis.set(yticks=[], ylim=(-0.12, 1.12))
    for side in axis.spines.values():
        side.set_visible(False)


def _limits(values):
    """What is shown of values: all but those far beyond the worse half."""
    low, middle = float(values.min()), float(np.median(values))
    high = min(float(values.max()), middle + 3 * (middle - low) + 1e-12)
    margin = 0.05 * (high - low) or 0.5
    return low - margin if low - margin > 0 or low <= 0 else 0.9 * low, high + margin


def _colours(values):
    rank = np.argsort(np.argsort(values)) / max(len(values) - 1, 1)
    return need("matplotlib", "a picture", extra="plot").colormaps["viridis_r"](rank)


def _positions(values):
    """Where values stand on an axis: (numbers, names of the ticks or None, log?)."""
    if all(map(is_number, values)):
        x = np.array(values, float)
        return x, None, x.min() > 0 and x.max() > 20 * x.min()
    names = sorted({str(v) for v in values}, key=_natural)
    return np.array([names.index(str(v)) for v in values], float), names, False


def _natural(name):
    """Numbers by their size, then words by their letters."""
    try:
        return (0, float(name), name)
    except ValueError:
        return (1, 0.0, name)
