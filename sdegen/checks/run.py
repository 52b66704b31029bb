"""Is this process what it says it is? The parts of a check, in the order of a report.

    finite     all functions finite at all times                          `moments`
    moments    alpha, sigma against drift, diffusion                      `moments`
    weak form  p_t against the equation                                 `weak_form`
    reversal   the flow and the reverse SDE bring data back              `reversal`
    terminal   x at t_max against the noise                              `reversal`

The other files are for processes of one kind.
"""

import dataclasses
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
from . import custom_sde, moments, non_gaussian, reversal, weak_form
from .interpolants import check_interpolant
from .momentum import check_momentum
from .per_coordinate import chosen, labelled
from .report import Report, Row, skipped
from .tables import Case

PARTS = ("finite", "moments", "weak form", "reversal", "terminal")
_TOLERANCE = {"float64": 1e-6, "float32": 1e-4}
_COARSE = 1e-2  # bfloat16, float16
KINDS = AbstractSDE | AbstractPath | AbstractInterpolant


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
    data through `probability_flow` and `reverse`; x at t_max. For an SDE alone: a
    numerical solution on the line against simulation, reversal and `noise`. For a path
    alone: what it declares. All is computed in float64 from the numbers in the process;
    their precision sets the limits.

    **Arguments:**
    - `process`: an `AbstractSDE`, an `AbstractPath`, both, or an `AbstractInterpolant`;
      an object.
    - `shape`: that of one sample; (2,), or (1,) for an SDE without a path.
    - `seed`: of the random parts; 0.
    - `samples`: of the random parts; 8000.
    - `parts`: a choice of `sdegen.checks.PARTS`; all.

    **Returns:** a `Report`: print it, or read `.ok`, `.rows`, `.failed`, `.advice`.

    **Raises:** a ValueError for what is no process, and for wrong arguments. What a
    check finds never raises.
    """
    _check_arguments(process, shape, samples, parts)
    precision = _precision(process)
    with jax.enable_x64(True):
        process, key = _as_float64(process), jax.random.key(seed)
        shape = None if shape is None else tuple(shape)
        tol = _TOLERANCE.get(precision, _COARSE)
        case = Case(process, key, shape, samples, tuple(parts), tol)
        rows, advice = [], []
        if isinstance(process, AbstractInterpolant):
            rows = check_interpolant(case)
        elif isinstance(process, AbstractBlockSDE):
            rows = check_momentum(case)
        elif not isinstance(process, AbstractPath):
            rows = custom_sde.check_sde(case)
        elif process.scales(process.t_min)[0].ndim:
            for one in chosen(process, shape):
                own = dataclasses.replace(case, process=one, shape=(2,))
                found, hints = _check_path(own)
                rows += labelled(found, one)
                advice += [hint for hint in hints if hint not in advice]
        else:
            rows, advice = _check_path(case)
    return Report(type(process).__name__, precision, tuple(rows), tuple(advice))


def _check_arguments(process, shape, samples, parts):
    if not isinstance(process, KINDS):
        found = f"an object of type {type(process).__name__}"
        if isinstance(process, type):
            found = f"the class {process.__name__}: call the class to get an object"
        raise ValueError(
            "check needs an object derived from AbstractSDE, AbstractPath or "
            f"AbstractInterpolant, got {found}."
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


def _check_path(case):
    path, parts = case.process, case.parts
    shape = (2,) if case.shape is None else case.shape
    if path.noise.gaussian:
        for size in ((1,), shape):
            if wrong := custom_sde.shape_rows(case.sde, size):
                return wrong, []
    ends, inside, grid = moments.moment_tables(case.clock, path, shape)
    rows = moments.end_rows(ends, inside) if "finite" in parts else []
    if not path.noise.gaussian:
        return rows + _other_noise(case), []
    found, advice = moments.moment_rows(inside, grid, case.tol), []
    if "moments" in parts and isinstance(path, AbstractSDE):
        rows += found
        advice = moments.advice(inside, found, case.tol)
    elif "moments" in parts:
        rows += moments.path_rows(grid)
    if "weak form" in parts:
        rows += weak_form.line_rows(case) + weak_form.space_rows(case, shape)
        if not all(row.passed for row in found[:2]):  # not linear: simulate, too
            rows.append(reversal.forward_row(case))
    if "reversal" in parts:
        rows += reversal.path_reversal(case)
    if "terminal" in parts:
        rows += reversal.terminal_rows(case.clock, path)
    return rows, advice


def _other_noise(case):
    """Noise that is not Gaussian has no SDE and no score: the flow, and x at t_max."""
    name, parts, rows = type(case.process.noise).__name__, case.parts, []
    if isinstance(case.process, AbstractSDE):
        what = "an SDE has Gaussian noise"
        why = f"noise = {name}, but dw is Gaussian: x_t = alpha x0 + sigma z needs both"
        rows.append(Row("finite", "noise", what, passed=False, remark=why))
    why = f"the noise, {name}, is not Gaussian: no SDE has this path"
    rows += [skipped(p, p, "", why) for p in ("moments", "weak form") if p in parts]
    if "reversal" in parts:
        rows += non_gaussian.flow_rows(case)
        rows.append(skipped("reversal", reversal.SDE, "", why))
    if "terminal" in parts:
        rows += reversal.terminal_rows(case.clock, case.process)
        rows += non_gaussian.noise_rows(case)
    return rows


def _precision(process: PyTree) -> str:
    """The coarsest floating-point dtype among the numbers of `process`."""
    leaves = [a for a in jax.tree.leaves(process) if eqx.is_inexact_array(a)]
    dtypes = {np.dtype(a.dtype) for a in leaves} or {np.dtype(np.float64)}
    return min(dtypes, key=lambda d: (d.itemsize, str(d))).name


def _as_float64(process):
    numbers, rest = eqx.partition(process, eqx.is_inexact_array)
    convert = lambda a: jnp.asarray(np.asarray(a), jnp.float64)  # noqa: E731
    return eqx.combine(jax.tree.map(convert, numbers), rest)
