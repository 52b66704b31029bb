"""Pictures of a run, as PNG files.

Every function writes one to `path`, its first argument, and returns the path.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from .._compat import need


def _matplotlib(module):
    return need(f"matplotlib.{module}", "a picture", extra="plot")


def new_figure(width: float | int, height: float | int) -> Any:
    """An empty figure of Matplotlib, in inches."""
    size = (width, height)
    return _matplotlib("figure").Figure(figsize=size, layout="constrained")


def _panels(count: int, columns: int, width: float, height: float):
    """A figure with `count` axes in use, row by row."""
    rows = -(-count // columns)
    figure = new_figure(width * columns, height * rows)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def tile(images: Float[np.ndarray, "rows columns h w c"]) -> np.ndarray:
    """A grid of images in [-1, 1] as one picture, (height, width, 3) uint8."""
    picture = _tile(images)
    shape = (*picture.shape[:2], 3)
    return np.broadcast_to(255 * picture + 0.5, shape).astype(np.uint8)


def write(path: str | Path, picture: np.ndarray) -> Path:
    """A picture, (height, width, 3) uint8, as a PNG file; returns its path."""
    imsave = _matplotlib("image").imsave
    path = _with_folder(path)
    imsave(path, picture)
    return path


def _tile(images) -> np.ndarray:
    """(rows, columns, h, w, c) images as one, with a thin border between."""
    images = np.clip((np.asarray(images, np.float32) + 1) / 2, 0, 1)
    images = images.repeat(4, axis=2).repeat(4, axis=3)  # so that the border is thin
    border = ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0))
    padded = np.pad(images, border, constant_values=0.1)
    rows, columns, h, w, c = padded.shape
    return padded.swapaxes(1, 2).reshape(rows * h, columns * w, c)[:-1, :-1]


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
    """Groups of images side by side.

    **Arguments:**
    - `groups`: {title: images in [-1, 1]}; one channel is drawn as ink on paper.
    - `columns`, `rows`: of images in a group, default 10 and 10.
    """
    figure = new_figure(3.2 * len(groups), 3.2 * rows / columns + 0.4)
    axes = np.atleast_1d(figure.subplots(1, len(groups)))
    for axis, (title, images) in zip(axes, groups.items(), strict=True):
        images = np.asarray(images)
        whole = min(len(images) // columns, rows)
        shape = (whole, columns, *images.shape[1:])
        _show(axis, _tile(images[: whole * columns].reshape(shape)))
        axis.set_title(title)
    return save(figure, path)


def image_flow(
    path: str | Path,
    frames: Float[np.ndarray, "times n h w c"],
    times: Float[np.ndarray, " times"],
    *,
    columns: int = 9,
    rows: int = 6,
    title: str = "",
) -> Path:
    """Samples on their way from noise (left) to data (right), one to a row.

    **Arguments:**
    - `frames`, `times`: as in `Solution.trajectory` and `Solution.times`.
    - `columns`, `rows`: how many frames and samples are drawn, default 9 and 6.
    - `title`: of the figure.
    """
    frames, times = np.asarray(frames), np.asarray(times)
    pick = np.linspace(0, len(frames) - 1, columns).round().astype(int)
    shown = frames[pick, :rows]
    # Each frame by its own size: the noise of an exploding process is far from [-1, 1].
    scale = np.maximum(1, np.quantile(np.abs(shown), 0.99, axis=(1, 2, 3, 4)))
    shown = (shown / scale[:, None, None, None, None]).swapaxes(0, 1)
    axis = new_figure(1.0 * columns, 1.0 * rows + 0.8).subplots()
    _show(axis, _tile(shown))
    width = 4 * shown.shape[3] + 1
    for i, t in enumerate(times[pick]):
        axis.text((i + 0.5) * width, -4, f"t = {t:.3g}", ha="center", fontsize=9)
    axis.set_title(title, pad=20)
    return save(axis.figure, path)


def point_clouds(
    path: str | Path,
    groups: Mapping[str, Float[np.ndarray, "n 2"]],
    *,
    columns: int = 5,
    limit: float | None = None,
) -> Path:
    """Sets of points in the plane side by side, on equal axes.

    **Arguments:**
    - `groups`: {title: points}.
    - `columns`: panels to a row, default 5.
    - `limit`: axes go from -limit to limit; default 1.2 times the largest coordinate.
    """
    columns = min(columns, len(groups))
    if limit is None:
        limit = 1.2 * max(float(np.quantile(np.abs(g), 0.995)) for g in groups.values())
    figure, axes = _panels(len(groups), columns, 2.4, 2.6)
    for axis, (title, points) in zip(axes, groups.items(), strict=True):
        points = np.asarray(points)
        axis.scatter(points[:, 0], points[:, 1], s=2, alpha=0.5, linewidths=0)
        axis.set_title(title, fontsize=9)
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        axis.tick_params(labelsize=7)
    return save(figure, path)


def paths(
    path: str | Path,
    groups: Mapping[tuple[str, str], Float[np.ndarray, "frames n 2"]],
    *,
    shown: int = 200,
) -> Path:
    """The paths of points in the plane: grey starts, blue ends, lines between them.

    **Arguments:**
    - `groups`: {(row, column): frames}; a row has equal axes.
    - `shown`: points to a panel at most, default 200.
    """
    rows = list(dict.fromkeys(row for row, _ in groups))
    columns = list(dict.fromkeys(column for _, column in groups))
    figure = new_figure(2.4 * len(columns), 2.5 * len(rows))
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, row in enumerate(rows):
        own = [np.asarray(z) for (r, _), z in groups.items() if r == row]
        ends = np.concatenate([z[[0, -1]].reshape(-1, 2) for z in own])
        low, high = np.quantile(ends, [0.001, 0.999], axis=0)
        middle, half = (low + high) / 2, 0.55 * float((high - low).max())
        for j, column in enumerate(columns):
            axis = axes[i, j]
            across, up = ((m - half, m + half) for m in middle)
            axis.set(xlim=across, ylim=up, aspect="equal", xticks=[], yticks=[])
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
    return save(figure, path)


def curves(
    path: str | Path,
    groups: Mapping[str, Sequence[float] | tuple],
    *,
    xlabel: str,
    ylabel: str,
    smooth: int = 1,
) -> Path:
    """Curves in one panel.

    **Arguments:**
    - `groups`: {label: y over 1, 2, 3, ...}, or {label: (x, y)}.
    - `xlabel`, `ylabel`: of the axes.
    - `smooth`: each point is the mean of so many values, default 1.
    """
    axis = new_figure(6, 3.5).subplots()
    for label, values in groups.items():
        if not isinstance(values, tuple):
            values = np.arange(1, len(values) + 1), values
        x, y = map(np.asarray, values)
        window = max(1, min(smooth, len(y)))
        whole = len(y) // window * window
        y = y[:whole].reshape(-1, window).mean(1)
        axis.plot(x[window - 1 : whole : window], y, label=label)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if len(groups) > 1:
        axis.legend(fontsize=8)
    return save(axis.figure, path)


def error_curves(
    path: str | Path,
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    *,
    xlabel: str,
    columns: int = 2,
) -> Path:
    """Errors over cost, both logarithmic.

    **Arguments:**
    - `panels`: {title: {label: (costs, errors)}}; a label looks alike in all panels.
    - `xlabel`: what the cost is.
    - `columns`: panels to a row, default 2.
    """
    figure, axes = _panels(len(panels), columns, 5.2, 3.9)
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
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
    place = {"loc": "outside right center", "fontsize": 8}
    figure.legend(handles.values(), handles.keys(), **place)
    return save(figure, path)


def density(
    path: str | Path,
    groups: Mapping[str, Sequence[float]],
    *,
    bins: int = 80,
    limits: tuple[float, float] | None = None,
    xlabel: str = "x",
) -> Path:
    """Histograms of numbers in one panel.

    **Arguments:**
    - `groups`: {label: numbers}.
    - `bins`: default 80.
    - `limits`: ends of the axis, default those of the numbers.
    - `xlabel`: of the axis.
    """
    axis = new_figure(6, 3.5).subplots()
    numbers = [np.ravel(values) for values in groups.values()]
    options = {"bins": bins, "density": True, "histtype": "step"}
    if limits is None:
        limits = min(map(np.min, numbers)), max(map(np.max, numbers))
    for label, values in zip(groups, numbers, strict=True):
        axis.hist(values, range=limits, label=label, **options)
    axis.set(xlabel=xlabel, ylabel="density")
    axis.legend(fontsize=8)
    return save(axis.figure, path)


def calibration(
    path: str | Path,
    truth: Sequence[float],
    found: Sequence[float],
    scores: Sequence[float],
    *,
    xlabel: str,
    ylabel: str,
) -> Path:
    """Estimates against the truth, and a histogram of their errors.

    **Arguments:**
    - `truth`, `found`: the numbers and their estimates.
    - `scores`: errors in units of their error bars, drawn with the standard normal
      density, which they have where the error bars are right.
    - `xlabel`, `ylabel`: of the left panel.
    """
    figure = new_figure(8, 3.6)
    left, right = figure.subplots(1, 2)
    ends = [min(*truth, *found), max(*truth, *found)]
    left.plot(ends, ends, color="0.6", linewidth=1)
    left.scatter(truth, found, s=3, alpha=0.5, linewidths=0)
    left.set(xlabel=xlabel, ylabel=ylabel)
    x = np.linspace(-5, 5, 201)
    right.hist(np.clip(scores, -5, 5), bins=50, range=(-5, 5), density=True, alpha=0.6)
    right.plot(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), color="C1")
    right.set(xlabel="error of the probes / their error bar", ylabel="density")
    return save(figure, path)


def save(figure: Any, path: str | Path) -> Path:
    """Write a figure of Matplotlib as a PNG file."""
    path = _with_folder(path)
    figure.savefig(path, dpi=150)
    return path


def _with_folder(path):
    """`path`, whose folder is made."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
