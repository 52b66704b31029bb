"""Is this process what it says it is? The parts of a check, in the order of a report.

    ends          all functions finite at both ends                    `moments`
    moments       alpha, sigma against drift, diffusion                `moments`
    weak form     the law of x_t against the equation   `weak_form`, `weak_samples`
    reversal      the flow and the reverse SDE bring data back         `reversal`
    terminal law  the law at t_max against the noise                   `terminal`

An SDE without a path has its law solved for on a grid first (`fokker_planck`); one of
a state with auxiliary rows is looked at in its state (`state`).
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..processes.interpolant import AbstractInterpolant
from ..processes.momentum import AbstractBlockSDE
from ..processes.path import AbstractPath
from ..processes.sde import AbstractSDE
from ..typing import PyTree
from . import custom_sde as no_path
from . import interpolants as tracks
from . import moments, reversal, terminal, weak_form
from . import momentum as state
from . import non_gaussian as other_noise
from . import per_coordinate as coordinates
from . import weak_form_samples as weak_samples
from .report import Report, Row, skipped
from .tables import Clock, window
from .test_data import data

PARTS = ("finite", "moments", "weak form", "reversal", "terminal law")
_TOLERANCE = {"float64": 1e-6, "float32": 1e-4}
_COARSE = 1e-2  # bfloat16, float16


def check(
    process: Any,
    *,
    shape: Sequence[int] | None = None,
    seed: int = 0,
    samples: int = 8000,
    parts: Sequence[str] = PARTS,
) -> Report:
    """Do the functions that a process declares belong together?

    For a path and SDE (`alpha`, `sigma`, `drift`, `diffusion`): the moment equations;
    the weak form of Fokker-Planck for the process, its flow and its reversals; known
    data through `probability_flow` and `reverse`; the law at t_max. For an SDE alone:
    the law from a numerical solution on the line against simulation, reversal and
    `noise`. For a path alone: what it declares. For an SDE of a state with auxiliary
    rows: its moments, simulated states, and data brought back in the state. Everything
    is computed in float64 from the numbers that the process holds; how precise these
    are sets the limits.

    **Arguments:** `process`, an `AbstractSDE`, an `AbstractPath` or both, or an
    `AbstractInterpolant`, an object;
    `shape` of one sample (default (2,), or (1,) for an SDE without a path); `seed`;
    `samples` of the random checks; `parts`, a choice of `sdegen.check.PARTS`.

    **Returns:** a `Report`: print it, or ask `.ok`, `.rows`, `.failed`, `.advice`. What
    a check finds never raises.
    """
    if not isinstance(process, AbstractSDE | AbstractPath | AbstractInterpolant):
        hint = " An object is needed: call the class." if _is_ours(process) else ""
        raise ValueError(
            "check needs an AbstractSDE, an AbstractPath or an AbstractInterpolant, got "
            f"{_name(process)}.{hint or ' Derive its class from one of them.'}"
        )
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(
            f"check has the parts {', '.join(map(repr, PARTS))}, got {unknown[0]!r}."
        )
    if samples < 100:
        raise ValueError(f"check needs at least 100 samples, got {samples}.")
    if shape is not None and (len(shape) < 1 or min(shape) < 1):
        raise ValueError(
            f"shape must be that of one sample, such as (2,), got {tuple(shape)}."
        )
    precision = _precision(process)
    with jax.enable_x64(True):
        process = _as_float64(process)
        shape = None if shape is None else tuple(shape)
        key, tol = jax.random.key(seed), _TOLERANCE.get(precision, _COARSE)
        if isinstance(process, AbstractInterpolant):
            rows, advice = tracks.check_track(key, process, shape, parts, tol), []
        elif isinstance(process, AbstractBlockSDE):
            rows, advice = state.check_state(key, process, samples, parts, tol)
        elif (
            isinstance(process, AbstractPath) and process.scales(process.t_min)[0].ndim
        ):
            rows, advice = [], []
            for one in coordinates.chosen(process, shape):
                found, hints = _check_path(key, one, (2,), samples, parts, tol)
                rows += coordinates.labelled(found, one)
                advice += [hint for hint in hints if hint not in advice]
        elif isinstance(process, AbstractPath):
            rows, advice = _check_path(key, process, shape, samples, parts, tol)
        else:
            rows, advice = no_path.check_sde(key, process, shape, samples, parts)
    return Report(type(process).__name__, precision, tuple(rows), tuple(advice))


def _check_path(key, path, shape, samples, parts, tol):
    shape = (2,) if shape is None else shape
    sde = path if isinstance(path, AbstractSDE) else None
    if not path.noise.gaussian:
        return _check_other_noise(key, path, sde, shape, samples, parts)
    process = window(path, path.t_min, path.t_max)
    rows, advice = [], []
    for size in ((1,), shape):
        problem = no_path.shape_problem(process, size)
        if problem is not None:
            what = "drift and diffusion of one sample"
            fault = Row("finite", "shapes", what, passed=False, remark=problem)
            return [fault], []
    clock, law = Clock(path), data()
    ends, inside, grid = moments.moment_tables(clock, path, path, shape)
    if "finite" in parts:
        rows += moments.end_rows(ends, inside)
    found = moments.moment_rows(inside, grid, tol)
    if "moments" in parts:
        if sde is None:
            rows += moments.path_rows(grid)
        else:
            rows += found
            advice = moments.advice(inside, found, tol)
    if "weak form" in parts:
        rows += weak_form.line_rows(clock, path, process, law, tol)
        rows += weak_samples.space_rows(key, clock, path, process, law, shape, samples)
        if not all(row.passed for row in found[:2]):  # not linear: simulate, too
            rows.append(reversal.forward_row(key, clock, path, law, samples))
    if "reversal" in parts:
        rows += reversal.path_reversal(key, clock, path, path, law, samples)
    if "terminal law" in parts:
        rows += terminal.terminal_rows(clock, path, law)
    return rows, advice


def _check_other_noise(key, path, sde, shape, samples, parts):
    """A path whose noise is not Gaussian has no SDE and no score: its flow, its law."""
    name, rows = type(path.noise).__name__, []
    clock, law = Clock(path), data()
    ends, inside, grid = moments.moment_tables(clock, path, path, shape)
    if "finite" in parts:
        rows += moments.end_rows(ends, inside)
    if sde is not None:
        what = "an SDE has Gaussian noise"
        why = f"noise = {name}, but dw is Gaussian: x_t = alpha x0 + sigma z needs both"
        rows.append(Row("finite", "noise", what, passed=False, remark=why))
    why = f"the noise, {name}, is not Gaussian: no SDE has this path"
    for part in ("moments", "weak form"):
        if part in parts:
            rows.append(skipped(part, part, "", why))
    if "reversal" in parts:
        rows += other_noise.flow_rows(key, clock, path)
        rows.append(skipped("reversal", reversal.SDE, "", why))
    if "terminal law" in parts:
        rows += terminal.terminal_rows(clock, path, law)
        rows += other_noise.noise_rows(key, path, samples)
    return rows, []


def _is_ours(process):
    return isinstance(process, type) and issubclass(process, AbstractSDE | AbstractPath)


def _name(process):
    if isinstance(process, type):
        return f"the class {process.__name__}"
    return f"an object of type {type(process).__name__}"


def _precision(process: PyTree) -> str:
    """The coarsest floating-point dtype among the numbers of `process`."""
    leaves = [a for a in jax.tree.leaves(process) if eqx.is_inexact_array(a)]
    dtypes = {np.dtype(a.dtype) for a in leaves} or {np.dtype(np.float64)}
    return min(dtypes, key=lambda d: (d.itemsize, str(d))).name


def _as_float64(process):
    def convert(a):
        if eqx.is_inexact_array(a):
            return jnp.asarray(np.asarray(a), jnp.float64)
        return a

    return jax.tree.map(convert, process)
