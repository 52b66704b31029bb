"""The moment equations: do alpha and sigma belong to the drift and the diffusion?

For dx = f(t) x dt + g(t) dw, x_t given x0 is N(alpha x0, sigma^2) with

    alpha' = f alpha,                                                              (1)
    (sigma^2)' = 2 f sigma^2 + g^2.                                                (2)

Residuals are relative to the size of the terms. Rates come by autodiff, which a custom
derivative can deceive, so (1) and (2) are also integrated and compared with the
functions themselves:

    log alpha(t) - log alpha(s) = int f,                                           (3)
    log sigma^2(t) - log sigma^2(s) = int (2 f + g^2 / sigma^2).                   (4)

What repairs a failure is found by trying: one declared function is replaced by a
multiple, its square or its square root, so that (1) and (2) hold at all times.
"""

import dataclasses
import itertools

import numpy as np

from ..processes.path import AbstractPath
from .report import Row, measured, skipped
from .tables import Clock, Table, Window, tabulate

_TIMES = 64
_CELLS = 512  # of the quadrature of (3) and (4)
_INTEGRALS = 5e-3  # a chain's rates jump inside a cell, which costs about 1e-3
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(4)
_RATIO = 1e-3  # alpha / sigma at which the times end where alpha falls to 0
_ENDS = "alpha, sigma, their rates, drift and diffusion, all times"


def moment_tables(
    clock: Clock, path: AbstractPath, shape: tuple[int, ...]
) -> tuple[Table, Table, Table]:
    """t_min and t_max; the times of (1) and (2); the nodes of (3) and (4)."""
    times = clock.even(_TIMES, _RATIO)
    edges = np.unique(clock.even(_CELLS, _RATIO, offset=0.0))
    edges = np.concatenate([edges, np.full(_CELLS + 1 - len(edges), edges[-1])])
    nodes = edges[:-1, None] + np.diff(edges)[:, None] * (_NODES + 1) / 2
    ts = np.concatenate([[clock.low, clock.high], times, edges, nodes.ravel()])
    table = tabulate(path, Window(path, clock.low, clock.high), ts, shape)
    return table[:2], table[2 : _TIMES + 2], table[_TIMES + 2 :]


def end_rows(ends: Table, inside: Table) -> list[Row]:
    """Everything finite at all times; infinite coefficients only where alpha = 0."""
    names = {"alpha": "alpha", "sigma": "sigma", "d_alpha": "alpha'"}
    names |= {"d_sigma": "sigma'", "f": "drift", "g": "diffusion", "bend": "drift"}
    low = {"alpha": -1e-300, "sigma": 0.0, "g": -1e-300}
    empty = ends.alpha[1] == 0
    bad, infinite = [], set()
    for (name, said), table in itertools.product(names.items(), (inside, ends)):
        for t, value in zip(table.ts, getattr(table, name), strict=True):
            if np.isfinite(value) and value > low.get(name, -np.inf):
                continue
            at_end = empty and t == ends.ts[1] and name in ("f", "g", "bend")
            if at_end and not np.isfinite(value):
                infinite.add(said)
            else:
                bad.append(f"{said} = {value:g} at t = {t:g}")
    remark = "; ".join(bad[:3]) + (f"; and {len(bad) - 3} more" if len(bad) > 3 else "")
    if infinite and not bad:
        remark = (
            f"{' and '.join(sorted(infinite))} infinite at t_max, where alpha = 0: use "
            "sample, or a smaller t_max for reverse"
        )
    return [measured("finite", "finite", _ENDS, len(bad), 0, remark=remark)]


def moment_rows(inside: Table, grid: Table, tol: float) -> list[Row]:
    """Linear drift, (1), (2), and (3) with (4)."""
    with np.errstate(all="ignore"):
        bend = inside.bend / inside.rate
        scatter = inside.scatter / (inside.sigma**2 * inside.rate + inside.g**2)
    first, second = residuals(inside)
    rows = (
        ("linear drift", "drift(t, x) = f(t) x, at several x and x = 0", bend),
        ("diffusion", "diffusion(t, x) is one g(t) for all x", scatter),
        ("moments", "alpha' = f alpha", first),
        ("moments", "(sigma^2)' = 2 f sigma^2 + g^2", second),
    )
    what = "log alpha, log sigma^2 = integrals of f and g^2"
    return [*(_row(*row, tol, inside.ts) for row in rows), _integrals(grid, what)]


def path_rows(grid: Table) -> list[Row]:
    """What can be tested of a path that declares no coefficients."""
    why = "this path declares no drift and no diffusion: there is nothing to compare"
    names = "alpha' = f alpha, (sigma^2)' = 2 f sigma^2 + g^2"
    row = _integrals(grid, "log alpha, log sigma^2 = integrals of their rates")
    return [skipped("moments", "moments", names, why), row]


def residuals(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Equations (1) and (2) at each time, relative to the size of their terms."""
    alpha, sigma, f, g = table.alpha, table.sigma, table.f, table.g
    with np.errstate(all="ignore"):
        first = np.abs(table.d_alpha - f * alpha) / (alpha * table.rate)
        change = 2 * sigma * table.d_sigma
        size = np.abs(change) + 2 * np.abs(f) * sigma**2 + g**2
        second = np.abs(change - 2 * f * sigma**2 - g**2) / size
    return first, second


def _integrals(grid, what):
    """The error of (3) and (4) from t_min to any time, over all that moved."""
    edges, inner = grid[: _CELLS + 1], grid[_CELLS + 1 :]
    weights = np.diff(edges.ts)[:, None] * _WEIGHTS / 2

    def total(rate):
        return (rate.reshape(weights.shape) * weights).sum(1).cumsum()

    with np.errstate(all="ignore"):
        slope = 2 * inner.f + inner.g**2 / inner.sigma**2
        log_alpha, log_var = np.log(edges.alpha), 2 * np.log(edges.sigma)
        error = np.abs(log_alpha[1:] - log_alpha[0] - total(inner.f))
        error = np.maximum(error, np.abs(log_var[1:] - log_var[0] - total(slope)))
        moved = total(np.abs(inner.f))[-1] + total(np.abs(slope))[-1]
        return _row("integrals", what, error / moved, _INTEGRALS, edges.ts[1:])


def _row(name, what, residual, limit, ts):
    wrong, remark = ~(residual <= limit), ""
    if wrong.any():
        at = ts[np.argmax(residual)]  # the first NaN, if there is one
        remark = f"at {wrong.sum()} of {len(ts)} times; the worst is t = {at:.4g}"
    return measured("moments", name, what, np.max(residual), limit, remark=remark)


_CHANGES = {
    "x 1/2": (0.5, 1),
    "x 2": (2, 1),
    "x -1": (-1, 1),
    "x sqrt(2)": (np.sqrt(2), 1),
    "x 1/sqrt(2)": (np.sqrt(0.5), 1),
    "^2": (1, 2),
    "^(1/2)": (1, 0.5),
}
"""Each as (c, p): v becomes c v^p, and its slope c p v^(p - 1) v'."""
_MEANING = {
    ("diffusion", "^(1/2)"): "you returned g^2 for g",
    ("diffusion", "^2"): "you returned sqrt(g) for g",
    ("diffusion", "x sqrt(2)"): "g^2 is half of what alpha and sigma need",
    ("diffusion", "x 1/sqrt(2)"): "g^2 is twice what alpha and sigma need",
    ("sigma", "^(1/2)"): "a variance for a standard deviation",
    ("sigma", "^2"): "the root of a standard deviation",
    ("alpha", "^(1/2)"): "alpha^2 (alpha_bar) for alpha",
    ("alpha", "^2"): "the root of alpha",
    ("drift", "x -1"): "the sign; t = 0 is data and the drift runs forward",
}


def repairs(table: Table, tol: float) -> list[str]:
    """Every single change of a declared function that makes (1) and (2) hold."""
    found = []
    slots = {"drift": ("f",), "diffusion": ("g",)}
    slots |= {"alpha": ("alpha", "d_alpha"), "sigma": ("sigma", "d_sigma")}
    for (name, slot), change in itertools.product(slots.items(), _CHANGES):
        factor, power = _CHANGES[change]
        v, *slopes = (getattr(table, field) for field in slot)
        with np.errstate(all="ignore"):
            new = [factor * v**power]
            new += [factor * power * v ** (power - 1) * slope for slope in slopes]
        new = dict(zip(slot, new, strict=True))
        if all((r <= tol).all() for r in residuals(dataclasses.replace(table, **new))):
            text = f"{name} {change}" if power == 1 else f"{name} -> {name}{change}"
            meaning = _MEANING.get((name, change))
            found.append(f"{text}: {meaning}" if meaning else text)
    return found


def needed(table: Table, count: int = 5) -> str:
    """f and g that alpha and sigma need, beside those declared, at a few times."""
    lines = [f"{'t':>9}  {'f needed':>10} {'declared':>10}  {'g needed':>10} declared"]
    for i in np.linspace(0, len(table.ts) - 1, count).astype(int):
        row = table[i]
        f = row.d_alpha / row.alpha
        square = 2 * row.sigma * (row.d_sigma - row.sigma * f)
        g = f"{np.sqrt(square):10.4g}" if square >= 0 else f"{'none':>10}"
        lines.append(f"{row.ts:9.4g}  {f:10.4g} {row.f:10.4g}  {g} {row.g:8.4g}")
    return "\n".join(lines)


def advice(inside: Table, rows: list[Row], tol: float) -> list[str]:
    """What would repair the failed moment equations, if anything in one place would."""
    failed = {row.name for row in rows if row.passed is False}
    if not failed:
        return []
    which = [w for w in ("drift", "diffusion") if any(w in row for row in failed)]
    if which:
        return [
            "x_t = alpha x0 + sigma z needs drift f(t) x and diffusion g(t), the same "
            f"for all x: first repair the {' and the '.join(which)}.",
            needed(inside),
        ]
    if "moments" not in failed:
        return ["alpha or sigma and its own derivative in t disagree."]
    found = repairs(inside, max(tol, 1e-6))
    if found:
        head = "This repairs it:" if len(found) == 1 else "Any one of these repairs it:"
        return [head, *(f"  {text}" for text in found)]
    return [
        "No single factor repairs it; compare the schedules' constants.",
        needed(inside),
    ]
