"""An SDE without a path: its law comes from a grid, or from simulation alone.

On the line Fokker-Planck's equation gives p_t (`fokker_planck`), and then

    E[phi(x_t)] over simulated paths = int phi p_t                                 (1)

for test functions phi at several times, the flow and the reverse SDE with the score of
p_t bring the data back, and p_T is compared with `noise`. In more dimensions p_t is not
known; what is left is `noise` against simulated x_T, by test functions.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..processes.sde import AbstractSDE
from ..sampling.simulate import simulate
from .fokker_planck import GridLaw, solve
from .report import Row, measured, skipped
from .reversal import WHAT, return_rows
from .test_data import LINE, PROBES, SPACE, data

_STEPS = 1000  # of Euler-Maruyama
_TABLE = 300  # time steps of the grid law
_BAR = 5.0  # standard errors; many functions and times are looked at
_BIAS = 0.01  # Euler-Maruyama's, in units of the spread of phi
_BASE = 0.01  # probability by which p_T may miss base
_FLOW = 5e-3  # probability: the score is read from a table
_WHY = "an SDE without alpha and sigma declares nothing to compare with"


def shape_problem(sde: AbstractSDE, shape: tuple[int, ...]) -> str | None:
    """A sentence if drift or diffusion cannot take, or return, such a sample."""
    x, t = jax.ShapeDtypeStruct(shape, float), jax.ShapeDtypeStruct((), float)
    for name in ("drift", "diffusion"):
        try:
            out = eqx.filter_eval_shape(getattr(sde, name), t, x).shape
        except Exception as error:  # whatever the user's code raises is a finding
            first = str(error).strip().split("\n")[0][:160]
            return (
                f"{name} of a sample of shape {shape}: {type(error).__name__}: {first}"
            )
        if out != shape and not (name == "diffusion" and out == ()):
            scalar = " or a scalar" if name == "diffusion" else ""
            return (
                f"{name} of a sample of shape {shape} must have its shape{scalar}, "
                f"got {out}"
            )
    return None


def check_sde(key, sde, shape, samples, parts) -> tuple[list[Row], list[str]]:
    """The rows of an SDE that is no path."""
    line, asked = (1,), (1,) if shape is None else shape
    problem = shape_problem(sde, asked)
    if problem is not None:
        if shape is None:
            problem += "; give the shape of one sample (shape=, or --shape)"
        what = "drift and diffusion of one sample"
        return [Row("finite", "shapes", what, passed=False, remark=problem)], []
    rows = []
    if "finite" in parts:
        rows.append(_finite(sde, asked))
    if "moments" in parts:
        what = "alpha, sigma against drift, diffusion"
        rows.append(skipped("moments", "moments", what, _WHY))
    if not {"weak form", "reversal", "terminal law"} & set(parts):
        return rows, []
    known = shape_problem(sde, line) is None and asked == line
    law = data().standardised()
    x0 = law.sample(jax.random.fold_in(key, 1), samples, asked)
    solved = simulate(key, sde, x0, grid=_STEPS, trajectory=True)
    cloud = np.asarray(solved.trajectory)
    grid = None
    if known and np.isfinite(cloud).all():
        ts = np.linspace(float(sde.t_min), float(sde.t_max), _TABLE + 1)
        reach = 1.5 * max(float(np.abs(cloud).max()), 4.0)
        grid = solve(sde, law, ts, reach)
        if not np.isfinite(np.asarray(grid.p)).all():
            grid = None
    why = "simulated x_t are not finite" if known else f"p_t is unknown in {asked}"
    if "weak form" in parts:
        rows.append(_simulated(grid, cloud, why))
    if "reversal" in parts:
        rows += _reversed(key, sde, grid, samples, why)
    if "terminal law" in parts:
        rows.append(_terminal(key, sde, grid, cloud[-1]))
    return rows, []


def _finite(sde, shape):
    what = "drift and diffusion at many t and x; diffusion >= 0"
    ts = jnp.linspace(sde.t_min, sde.t_max, 33)
    f, g = _on_a_grid(sde, ts, jnp.linspace(-3.0, 3.0, 13), shape)
    f, g = np.asarray(f), np.asarray(g)
    bad = int((~np.isfinite(f)).sum() + (~(g >= 0)).sum() + np.isinf(g).sum())
    remark = ""
    if bad:
        where = ~np.isfinite(f).all((1, 2)) | ~(np.isfinite(g) & (g >= 0)).all((1, 2))
        t = float(ts[int(np.argmax(where))])
        remark = f"drift or diffusion is not finite, or diffusion < 0, at t = {t:.4g}"
    return measured("finite", "finite", what, bad, 0, remark=remark)


@eqx.filter_jit
def _on_a_grid(sde, ts, levels, shape):
    def at(t, c):
        x = c * jnp.ones(shape)
        g = jnp.broadcast_to(sde.diffusion(t, x), shape)
        return sde.drift(t, x).ravel(), g.ravel()

    return jax.vmap(lambda t: jax.vmap(lambda c: at(t, c))(levels))(ts)


def _simulated(grid: GridLaw | None, cloud, why):
    """Equation (1), at ten times, in standard errors beyond Euler's bias."""
    name, what = "Fokker-Planck", "E phi of simulated x_t and of p_t on a grid"
    if grid is None:
        return skipped("weak form", name, what, why)
    worst, where = 0.0, ""
    for i in np.linspace(_TABLE // 10, _TABLE, 10).astype(int).tolist():
        x = cloud[round(i * _STEPS / _TABLE)].ravel()
        for label, phi in LINE.items():
            exact = float(grid.mass(i) @ np.asarray(phi(grid.x)))
            found = np.asarray(phi(x))
            error = abs(found.mean() - exact) * np.sqrt(len(x)) / found.std()
            if not error <= worst:
                worst, where = error, f"worst: {label} at t = {float(grid.ts[i]):.3g}"
    allowed = _BAR + _BIAS * np.sqrt(len(x))
    remark = "" if worst <= allowed else where
    return measured("weak form", name, what, worst, allowed, "SE", remark)


def _reversed(key, sde, grid, samples, why):
    if grid is None:
        return [skipped("reversal", name, what, why) for name, what in WHAT.items()]
    last, first = grid.cdf(_TABLE), grid.cdf(0)
    q = jax.random.uniform(jax.random.fold_in(key, 2), (samples,))
    starts = (last.quantile(jnp.asarray(PROBES))[:, None], last.quantile(q)[:, None])
    return return_rows(key, sde, grid, starts, first, _STEPS, flow_bar=_FLOW)


def _terminal(key, sde, grid, x):
    """p_T against base: on a grid, or by test functions of simulated x_T."""
    if grid is None:
        return _simulated_end(key, sde, x)
    density = np.asarray(jax.vmap(lambda x: sde.noise.log_prob(x[None]))(grid.x))
    mass = np.exp(density) * np.diff(np.asarray(grid.edges))
    found = np.asarray(grid.cdfs[-1])[1:]
    gap = np.abs(found - mass.cumsum())
    worst, i = gap.max(), int(np.argmax(gap))
    remark = ""
    if not worst <= _BASE:
        x, p = np.asarray(grid.x), grid.mass(-1)
        mean = p @ x
        remark = (
            f"x_T has mean {mean:.3g} and standard deviation "
            f"{np.sqrt(p @ x**2 - mean**2):.3g}; P(x_T < {x[i]:.2g}) = {found[i]:.3f}, "
            f"and {mass.cumsum()[i]:.3f} by base "
            f"({type(sde.noise).__name__})"
        )
    what = "p_T and base, the largest difference of probability"
    return measured("terminal law", "noise end", what, worst, _BASE, remark=remark)


def _simulated_end(key, sde, x):
    what = f"E phi of simulated x_T and of base, {len(SPACE)} phi"
    if not np.isfinite(x).all():
        nan = float("nan")
        why = "simulated x_T are not finite"
        return measured("terminal law", "noise end", what, nan, _BAR, "SE", why)
    keys = jax.random.split(jax.random.fold_in(key, 3), len(x))
    z = jax.vmap(lambda k: sde.noise.sample(k, x.shape[1:]))(keys)
    both = [np.asarray(v).reshape(len(x), -1)[:, :3] for v in (x, z)]
    worst, where = 0.0, ""
    for label, phi in SPACE.items():
        ours, base = (np.asarray(jax.vmap(phi)(jnp.asarray(v))) for v in both)
        spread = np.sqrt(ours.var() + base.var())
        gap = abs(ours.mean() - base.mean())
        error = gap * np.sqrt(len(x)) / spread
        if not error <= worst:
            worst, where = error, f"worst for phi = {label}"
    allowed = _BAR + _BIAS * np.sqrt(len(x))
    remark = "" if worst <= allowed else where
    return measured("terminal law", "noise end", what, worst, allowed, "SE", remark)
