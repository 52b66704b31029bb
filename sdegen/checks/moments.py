"""The moment equations: do alpha and sigma belong to the drift and the diffusion?

For dx = f(t) x dt + g(t) dw, x_t given x0 is N(alpha x0, sigma^2) with

    alpha' = f alpha,                                                              (1)
    (sigma^2)' = 2 f sigma^2 + g^2,                                                (2)

at every time. Residuals are relative to the size of the terms: of (1) to alpha times
the rate |alpha'/alpha| + |sigma'/sigma|, of (2) to |2 sigma sigma'| + 2 |f| sigma^2 +
g^2. Rates come by autodiff, which a custom derivative can deceive, so (1) and (2) are
also integrated and compared with the functions themselves:

    log alpha(t) - log alpha(s) = int f,                                           (3)
    log sigma^2(t) - log sigma^2(s) = int (2 f + g^2 / sigma^2).                   (4)

What repairs a failure is found by trying: each declared function in turn is replaced by
a multiple, its square or its square root, until (1) and (2) hold at all times.
"""

import dataclasses

import numpy as np

from ..processes.path import AbstractPath
from .report import Row, measured, skipped
from .tables import Clock, Table, tabulate, window

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
    table = tabulate(path, window(path, clock.low, clock.high), ts, shape)
    return table[:2], table[2 : _TIMES + 2], table[_TIMES + 2 :]


def end_rows(ends: Table, inside: Table) -> list[Row]:
    """Everything finite at all times; infinite coefficients only where alpha = 0."""
    names = {"alpha": "alpha", "sigma": "sigma", "d_alpha": "alpha'"}
    names |= {"d_sigma": "sigma'", "f": "drift", "g": "diffusion", "bend": "drift"}
    empty = ends.alpha[1] == 0
    bad, infinite = [], set()
    for name, said in names.items():
        for table in (inside, ends):
            for t, value in zip(table.ts, getattr(table, name), strict=True):
                if np.isfinite(value):
                    continue
                if empty and t == ends.ts[1] and name in ("f", "g", "bend"):
                    infinite.add(said)
                else:
                    bad.append(f"{said} = {value} at t = {t:g}")
    for table in (inside, ends):
        for name, low in (("alpha", -1e-300), ("sigma", 0.0), ("g", -1e-300)):
            for t, value in zip(table.ts, getattr(table, name), strict=True):
                if value <= low:
                    bad.append(f"{names[name]} = {value:g} at t = {t:g}")
    remark = "; ".join(bad[:3]) + (f"; and {len(bad) - 3} more" if len(bad) > 3 else "")
    if infinite and not bad:
        remark = (
            f"{' and '.join(sorted(infinite))} infinite at t_max, where alpha = 0: use "
            "sample, or a smaller t_max for reverse"
        )
    return [measured("finite", "finite", _ENDS, len(bad), 0, remark=remark)]


def moment_rows(inside: Table, grid: Table, tol: float) -> list[Row]:
    """Linear drift, (1), (2), and (3) with (4)."""
    rate = inside.rate
    with np.errstate(all="ignore"):
        f_bend = _worst(inside.bend / rate)
        g_scale = inside.sigma**2 * rate + inside.g**2
        scatter = _worst(inside.scatter / g_scale)
    linear = "drift(t, x) = f(t) x, at several x and x = 0"
    rows = [_row("linear drift", linear, f_bend, tol)]
    rows += [_row("diffusion", "diffusion(t, x) is one g(t) for all x", scatter, tol)]
    names = ("alpha' = f alpha", "(sigma^2)' = 2 f sigma^2 + g^2")
    for name, residual in zip(names, residuals(inside), strict=True):
        rows.append(_row("moments", name, _worst(residual), tol, inside.ts, residual))
    what = "log alpha, log sigma^2 = integrals of f and g^2"
    rows.append(_row("integrals", what, *_integrals(grid)))
    return rows


def path_rows(grid: Table) -> list[Row]:
    """What can be tested of a path that declares no coefficients."""
    why = "this path declares no drift and no diffusion: there is nothing to compare"
    names = "alpha' = f alpha, (sigma^2)' = 2 f sigma^2 + g^2"
    what = "log alpha, log sigma^2 = integrals of their rates"
    row = _row("integrals", what, *_integrals(grid))
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


def _integrals(grid):
    """The largest error of (3) and (4) from t_min to any time, over all that moved."""
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
        return _worst(error / moved), _INTEGRALS


def _worst(residual):
    return float("nan") if np.isnan(residual).any() else float(residual.max())


def _row(name, what, worst, limit, ts=None, residual=None):
    remark = ""
    if ts is not None and not worst <= limit:
        wrong = ~(residual <= limit)
        at = ts[int(np.argmax(np.where(np.isnan(residual), np.inf, residual)))]
        remark = f"at {wrong.sum()} of {len(ts)} times; the worst is t = {at:.4g}"
    return measured("moments", name, what, worst, limit, remark=remark)


_CHANGES = {
    "x 1/2": lambda v, d: (v / 2, d / 2),
    "x 2": lambda v, d: (2 * v, 2 * d),
    "x -1": lambda v, d: (-v, -d),
    "x sqrt(2)": lambda v, d: (np.sqrt(2) * v, np.sqrt(2) * d),
    "x 1/sqrt(2)": lambda v, d: (v / np.sqrt(2), d / np.sqrt(2)),
    "^2": lambda v, d: (v**2, 2 * v * d),
    "^(1/2)": lambda v, d: (np.sqrt(v), d / (2 * np.sqrt(v))),
}
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
    slots = {"drift": ("f", None), "diffusion": ("g", None)}
    slots |= {"alpha": ("alpha", "d_alpha"), "sigma": ("sigma", "d_sigma")}
    for name, (value, slope) in slots.items():
        for change, rule in _CHANGES.items():
            old = getattr(table, value)
            with np.errstate(all="ignore"):
                v, d = rule(old, getattr(table, slope) if slope else 0 * old)
            new = {value: v} | ({slope: d} if slope else {})
            first, second = residuals(dataclasses.replace(table, **new))
            if (first <= tol).all() and (second <= tol).all():
                text = f"{name} {change}" if change[0] == "x" else None
                text = text or f"{name} -> {name}{change}"
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
    if not failed & {"moments", "linear drift", "diffusion", "integrals"}:
        return []
    if failed & {"linear drift", "diffusion"}:
        which = [w for w in ("drift", "diffusion") if any(w in row for row in failed)]
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
