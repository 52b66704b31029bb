"""Pictures of a run: image grids, the flow from noise to data, points in the plane."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float


def _figure(width: float | int, height: float | int):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib, which is not installed: pip install matplotlib."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def tile(images: Float[np.ndarray, "rows columns h w c"]) -> np.ndarray:
    """A grid of images in [-1, 1] as one picture, (height, width, 3) uint8."""
    rows, columns, *shape = np.shape(images)
    flat = _tile(np.reshape(images, (rows * columns, *shape)), columns)
    return np.uint8(np.broadcast_to(255 * flat + 0.5, (*flat.shape[:2], 3)))


def write(path: str | Path, picture: np.ndarray) -> Path:
    """A picture, (height, width, 3) uint8, as a PNG file; returns its path."""
    try:
        from matplotlib.image import imsave
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib, which is not installed: pip install matplotlib."
        ) from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, picture)
    return path


def _tile(images, columns: int) -> np.ndarray:
    """(n, h, w, c) images as one, `columns` to a row, with a thin border between."""
    images = np.clip((np.asarray(images, np.float32) + 1) / 2, 0, 1)
    images = images.repeat(4, axis=1).repeat(4, axis=2)  # so that the border is thin
    padded = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=0.1)
    rows = [
        np.concatenate(list(padded[i : i + columns]), axis=1)
        for i in range(0, len(padded) - columns + 1, columns)
    ]
    return np.concatenate(rows, axis=0)[:-1, :-1]


def _show(axis, image):
    if image.shape[-1] == 1:
        axis.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=1)
    else:
        axis.imshow(image)
    axis.set_axis_off()


def image_grids(
    path: str | Path,
    groups: Mapping[str, Float[np.ndarray, "n h w c"]],
    *,
    columns: int = 10,
    rows: int = 10,
) -> Path:
    """Groups of images in [-1, 1] side by side under titles; one channel is ink."""
    figure = _figure(3.2 * len(groups), 3.2 * rows / columns + 0.4)
    axes = np.atleast_1d(figure.subplots(1, len(groups)))
    for axis, (title, images) in zip(axes, groups.items(), strict=True):
        _show(axis, _tile(images[: columns * rows], columns))
        axis.set_title(title)
    return _save(figure, path)


def image_flow(
    path: str | Path,
    frames: Float[np.ndarray, "times n h w c"],
    times: Float[np.ndarray, " times"],
    *,
    columns: int = 9,
    rows: int = 6,
    title: str = "",
) -> Path:
    """From noise (left) to data (right): one sample to a row, frame by frame."""
    frames, times = np.asarray(frames), np.asarray(times)
    pick = np.linspace(0, len(frames) - 1, columns).round().astype(int)
    shown = frames[pick, :rows]
    # Each frame by its own size: the noise of an exploding process is far from [-1, 1].
    scale = np.maximum(1, np.quantile(np.abs(shown), 0.99, axis=(1, 2, 3, 4)))
    shown = (shown / scale[:, None, None, None, None]).swapaxes(0, 1)
    figure = _figure(1.0 * columns, 1.0 * rows + 0.8)
    axis = figure.subplots()
    _show(axis, _tile(shown.reshape(-1, *shown.shape[2:]), columns))
    width = 4 * shown.shape[3] + 1
    for i, t in enumerate(times[pick]):
        axis.text((i + 0.5) * width, -4, f"t = {t:.3g}", ha="center", fontsize=9)
    axis.set_title(title, pad=20)
    return _save(figure, path)


def point_clouds(
    path: str | Path,
    groups: Mapping[str, Float[np.ndarray, "n 2"]],
    *,
    columns: int = 5,
    limit: float | None = None,
) -> Path:
    """Sets of points in the plane side by side, each under its title, on equal axes."""
    columns = min(columns, len(groups))
    rows = -(-len(groups) // columns)
    if limit is None:
        limit = 1.2 * max(float(np.quantile(np.abs(g), 0.995)) for g in groups.values())
    figure = _figure(2.4 * columns, 2.6 * rows)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes[len(groups) :]:
        axis.set_axis_off()
    for axis, (title, points) in zip(axes, groups.items(), strict=False):
        points = np.asarray(points)
        axis.scatter(points[:, 0], points[:, 1], s=2, alpha=0.5, linewidths=0)
        axis.set_title(title, fontsize=9)
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        axis.tick_params(labelsize=7)
    return _save(figure, path)


def paths(
    path: str | Path,
    groups: Mapping[tuple[str, str], Float[np.ndarray, "frames n 2"]],
    *,
    shown: int = 200,
) -> Path:
    """Points on their way through the plane: {(row, column): frames}, on equal axes.

    Starts are grey, ends blue, the ways between them thin lines.
    """
    rows = list(dict.fromkeys(row for row, _ in groups))
    columns = list(dict.fromkeys(column for _, column in groups))
    figure = _figure(2.4 * len(columns), 2.5 * len(rows))
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, row in enumerate(rows):
        own = [np.asarray(z) for (r, _), z in groups.items() if r == row]
        ends = np.concatenate([z[[0, -1]].reshape(-1, 2) for z in own])
        low, high = np.quantile(ends, [0.001, 0.999], axis=0)
        middle, half = (low + high) / 2, 0.55 * float((high - low).max())
        for j, column in enumerate(columns):
            axis = axes[i, j]
            (left, right), (below, above) = ((m - half, m + half) for m in middle)
            axis.set(xlim=(left, right), ylim=(below, above), aspect="equal")
            axis.set(xticks=[], yticks=[])
            if i == 0:
                axis.set_title(column, fontsize=10)
            if j == 0:
                axis.set_ylabel(row, fontsize=9)
            if (row, column) not in groups:
                continue
            z = np.asarray(groups[row, column])[:, :shown]
            axis.plot(z[..., 0], z[..., 1], color="tab:olive", lw=0.4, alpha=0.5)
            axis.plot(*z[0].T, ".", color="0.4", ms=2)
            axis.plot(*z[-1].T, ".", color="tab:blue", ms=2)
    return _save(figure, path)


def curves(
    path: str | Path,
    groups: Mapping[str, Sequence[float] | tuple],
    *,
    xlabel: str,
    ylabel: str,
    smooth: int = 1,
) -> Path:
    """Curves over 1, 2, 3, ..., or (x, y), each averaged over windows of `smooth`."""
    figure = _figure(6, 3.5)
    axis = figure.subplots()
    for label, values in groups.items():
        given = isinstance(values, tuple)
        x, y = values if given else (np.arange(1, len(values) + 1), values)
        window = max(1, min(smooth, len(y)))
        whole = len(y) // window * window
        y = np.asarray(y)[:whole].reshape(-1, window).mean(1)
        axis.plot(np.asarray(x)[window - 1 : whole : window], y, label=label)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if len(groups) > 1:
        axis.legend(fontsize=8)
    return _save(figure, path)


def error_curves(
    path: str | Path,
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    *,
    xlabel: str,
    columns: int = 2,
) -> Path:
    """Errors over cost, both logarithmic: per panel and label (costs, errors)."""
    rows = -(-len(panels) // columns)
    figure = _figure(5.2 * columns, 3.9 * rows)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for label, (cost, error) in lines.items():
            i = labels.index(label)
            style = {"color": f"C{i % 10}", "marker": "osv^Dx"[i // 10 % 6]}
            axis.loglog(cost, error, label=label, markersize=4, linewidth=1.2, **style)
        ticks = sorted({n for costs, _ in lines.values() for n in costs})
        axis.set_xticks(ticks, [f"{n:g}" for n in ticks], fontsize=7)
        axis.set_xticks([], minor=True)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(xlabel)
        axis.grid(alpha=0.3)
    handles = {}
    for axis in axes:
        handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside right center", fontsize=8
    )
    return _save(figure, path)


def density(
    path: str | Path,
    groups: Mapping[str, Sequence[float]],
    *,
    bins: int = 80,
    limits: tuple[float, float] | None = None,
    xlabel: str = "x",
) -> Path:
    """Histograms of numbers on one axis, by default as wide as all the numbers."""
    if limits is None:
        numbers = np.concatenate([np.ravel(v) for v in groups.values()])
        limits = (float(numbers.min()), float(numbers.max()))
    figure = _figure(6, 3.5)
    axis = figure.subplots()
    for label, values in groups.items():
        axis.hist(
            np.asarray(values).ravel(),
            bins=bins,
            range=limits,
            density=True,
            histtype="step",
            label=label,
        )
    axis.set(xlabel=xlabel, ylabel="density")
    axis.legend(fontsize=8)
    return _save(figure, path)


def sweep(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    axes: Sequence[str],
    metric: str,
) -> Path:
    """A sweep: the metric against each axis, and all axes as parallel coordinates.

    `rows` are points of the space with the mean of `metric` over seeds and its standard
    error, "METRIC se". A line in a panel is the best point for each value of the axis.
    """
    rows = [row for row in rows if np.isfinite(row[metric])]
    axes = [a for a in axes if len({str(row.get(a)) for row in rows}) > 1]
    wide = max(len(axes), 1)
    figure = _figure(max(3.0 * wide, 5.0), 6.4)
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
    return _save(figure, path)


def _parallel(axis, rows, axes, metric, values, colour, limits):
    """Parallel coordinates: a line for each point, coloured by its metric."""
    columns, labels = [], []
    for name in axes:
        x, ticks, log = _positions([row.get(name) for row in rows])
        ends = (min(x), max(x))
        y = np.log(x / ends[0]) / np.log(ends[1] / ends[0]) if log else None
        columns.append((x - ends[0]) / (ends[1] - ends[0]) if y is None else y)
        if ticks is None:
            labels.append([f"{e:g}" for e in ends])
        else:
            labels.append([ticks[0], ticks[-1], *ticks[1:-1]])
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
    from matplotlib import colormaps

    rank = np.argsort(np.argsort(values)) / max(len(values) - 1, 1)
    return colormaps["viridis_r"](rank)


def _positions(values):
    """Where values stand on an axis: (numbers, names of the ticks or None, log?)."""
    if all(isinstance(v, float | int) and not isinstance(v, bool) for v in values):
        x = np.array(values, float)
        wide = x.min() > 0 and x.max() > 20 * x.min()
        return x, None, bool(wide)
    names = sorted({str(v) for v in values}, key=_natural)
    return np.array([names.index(str(v)) for v in values], float), names, False


def _natural(name):
    """Numbers by their size, then words by their letters."""
    try:
        return (0, float(name), name)
    except ValueError:
        return (1, 0.0, name)


def calibration(
    path: str | Path,
    truth: Sequence[float],
    found: Sequence[float],
    scores: Sequence[float],
    *,
    xlabel: str,
    ylabel: str,
) -> Path:
    """Numbers against the truth, and errors in units of their error bar on the normal.

    An honest error bar has `scores` of the standard normal law.
    """
    figure = _figure(8, 3.6)
    left, right = figure.subplots(1, 2)
    truth, found = np.asarray(truth), np.asarray(found)
    ends = [min(truth.min(), found.min()), max(truth.max(), found.max())]
    left.plot(ends, ends, color="0.6", linewidth=1)
    left.scatter(truth, found, s=3, alpha=0.5, linewidths=0)
    left.set(xlabel=xlabel, ylabel=ylabel)
    scores, x = np.clip(np.asarray(scores), -5, 5), np.linspace(-5, 5, 201)
    right.hist(scores, bins=50, range=(-5, 5), density=True, alpha=0.6)
    right.plot(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), color="C1")
    right.set(xlabel="error of the probes / their error bar", ylabel="density")
    return _save(figure, path)


def _save(figure, path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
