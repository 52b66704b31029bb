"""An SDE without a path: p_t comes from a grid, or from simulation alone.

On the line Fokker-Planck's equation gives p_t (`fokker_planck`), and then

    E[phi(x_t)] over simulated paths = int phi p_t                                 (1)

for test functions phi, the flow and the reverse SDE with the score of p_t bring the
data back, and p_T is that of `noise`. In more dimensions p_t is not known, and only
`noise` is tested against simulated x_T, by test functions.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..processes.sde import AbstractSDE
from ..sampling.simulate import simulate
from .fokker_planck import GridDensity, solve
from .report import Row, measured, skipped, worst
from .reversal import WHAT, return_rows
from .tables import Case
from .test_data import LINE, PROBES, SPACE, data

_STEPS = 1000  # of Euler-Maruyama
_TABLE = 300  # time steps of p_t on the grid
_BAR = 5.0  # standard errors; many functions and times are looked at
_BIAS = 0.01  # Euler-Maruyama's, in units of the spread of phi
_NOISE = 0.01  # probability by which p_T may miss the noise
_FLOW = 5e-3  # probability: the score is read from a table
_WHY = "an SDE without alpha and sigma declares nothing to compare with"


def shape_rows(sde: AbstractSDE, shape: tuple[int, ...], hint: str = "") -> list[Row]:
    """A failed row if drift or diffusion cannot take, or return, such a sample."""
    x, t = jax.ShapeDtypeStruct(shape, float), jax.ShapeDtypeStruct((), float)
    functions = {"drift": sde.drift, "diffusion": sde.diffusion}
    for name, function in functions.items():
        scalar = " or a scalar" if name == "diffusion" else ""
        try:
            out = eqx.filter_eval_shape(function, t, x).shape
            if out == shape or (scalar and out == ()):
                continue
            why = f" must have its shape{scalar}, got {out}"
        except Exception as error:  # whatever the user's code raises is a finding
            first = str(error).strip().split("\n")[0][:160]
            why = f": {type(error).__name__}: {first}"
        remark = f"{name} of a sample of shape {shape}{why}{hint}"
        what = "drift and diffusion of one sample"
        return [Row("finite", "shapes", what, passed=False, remark=remark)]
    return []


def check_sde(case: Case) -> list[Row]:
    """The rows of an SDE that is no path."""
    sde, key, parts = case.process, case.key, case.parts
    shape = (1,) if case.shape is None else case.shape
    hint = "; give the shape of one sample (shape=, or --shape)"
    rows = shape_rows(sde, shape, hint if case.shape is None else "")
    if rows:
        return rows
    if "finite" in parts:
        rows.append(_finite(sde, shape))
    if "moments" in parts:
        what = "alpha, sigma against drift, diffusion"
        rows.append(skipped("moments", "moments", what, _WHY))
    if not {"weak form", "reversal", "terminal"} & set(parts):
        return rows
    start = data().standardised()
    x0 = start.sample(jax.random.fold_in(key, 1), case.samples, shape)
    solved = simulate(key, sde, x0, grid=_STEPS, trajectory=True)
    cloud, grid, why = np.asarray(solved.trajectory), None, f"p_t is unknown in {shape}"
    if shape == (1,):
        why = "simulated x_t are not finite"
        if np.isfinite(cloud).all():
            ts = np.linspace(float(sde.t_min), float(sde.t_max), _TABLE + 1)
            reach = 1.5 * max(float(np.abs(cloud).max()), 4.0)
            grid = solve(sde, start, ts, reach)
            grid = grid if np.isfinite(np.asarray(grid.p)).all() else None
    if "weak form" in parts:
        rows.append(_simulated(grid, cloud, why))
    if "reversal" in parts:
        rows += _reversed(case, grid, why)
    if "terminal" in parts and grid is None:
        rows.append(_simulated_end(key, sde, cloud[-1]))
    elif "terminal" in parts:
        rows.append(_terminal(sde.noise, grid))
    return rows


def _finite(sde, shape):
    what = "drift and diffusion at many t and x; diffusion >= 0"
    ts = jnp.linspace(sde.t_min, sde.t_max, 33)
    values = _on_a_grid(sde, ts, jnp.linspace(-3.0, 3.0, 13), shape)
    f, g = map(np.asarray, values)
    bad = ~np.stack([np.isfinite(f), np.isfinite(g) & (g >= 0)], axis=1)
    remark = ""
    if bad.any():
        t = float(ts[np.argmax(bad.any((1, 2, 3)))])
        remark = f"drift or diffusion is not finite, or diffusion < 0, at t = {t:.4g}"
    return measured("finite", "finite", what, int(bad.sum()), 0, remark=remark)


@eqx.filter_jit
def _on_a_grid(sde, ts, levels, shape):
    def at(t, c):
        x = c * jnp.ones(shape)
        g = jnp.broadcast_to(sde.diffusion(t, x), shape)
        return sde.drift(t, x).ravel(), g.ravel()

    return jax.vmap(lambda t: jax.vmap(lambda c: at(t, c))(levels))(ts)


def _simulated(grid: GridDensity | None, cloud, why):
    """Equation (1), at ten times, in standard errors beyond Euler's bias."""
    name, what = "Fokker-Planck", "E phi of simulated x_t and of p_t on a grid"
    if grid is None:
        return skipped("weak form", name, what, why)
    errors, root = {}, np.sqrt(cloud.shape[1])
    for i in np.linspace(_TABLE // 10, _TABLE, 10).astype(int).tolist():
        x = cloud[round(i * _STEPS / _TABLE)].ravel()
        for label, phi in LINE.items():
            exact, found = grid.mass(i) @ np.asarray(phi(grid.x)), np.asarray(phi(x))
            error = abs(found.mean() - exact) * root / found.std()
            errors[f"{label} at t = {float(grid.ts[i]):.3g}"] = error
    return worst("weak form", name, what, errors, _BAR + _BIAS * root)


def _reversed(case, grid, why):
    if grid is None:
        return [skipped("reversal", name, what, why) for name, what in WHAT.items()]
    q = jax.random.uniform(jax.random.fold_in(case.key, 2), (case.samples,))
    last, probes = grid.cdf(_TABLE), jnp.asarray(PROBES)
    starts = (last.quantile(probes)[:, None], last.quantile(q)[:, None])
    end = (starts, grid.cdf(0), _STEPS)
    return return_rows(case.key, case.process, grid, *end, flow_bar=_FLOW)


def _terminal(noise, grid):
    """p_T on the grid against the noise."""
    density = np.asarray(jax.vmap(lambda x: noise.log_prob(x[None]))(grid.x))
    exact = np.cumsum(np.exp(density) * np.diff(np.asarray(grid.edges)))
    found, remark = np.asarray(grid.cdfs[-1])[1:], ""
    gaps = np.abs(found - exact)
    i = np.argmax(gaps)
    if not gaps[i] <= _NOISE:
        x, p = np.asarray(grid.x), grid.mass(-1)
        mean = p @ x
        remark = (
            f"x_T has mean {mean:.3g} and standard deviation "
            f"{np.sqrt(p @ x**2 - mean**2):.3g}; P(x_T < {x[i]:.2g}) = {found[i]:.3f}, "
            f"and {exact[i]:.3f} by the noise ({type(noise).__name__})"
        )
    what = "p_T and the noise, the largest difference of probability"
    return measured("terminal", "noise end", what, gaps[i], _NOISE, remark=remark)


def _simulated_end(key, sde, x):
    """Simulated x_T against draws of the noise, by test functions."""
    what = f"E phi of simulated x_T and of the noise, {len(SPACE)} phi"
    if not np.isfinite(x).all():
        why = "simulated x_T are not finite"
        return measured("terminal", "noise end", what, float("nan"), _BAR, "SE", why)
    keys = jax.random.split(jax.random.fold_in(key, 3), len(x))
    z = jax.vmap(lambda k: sde.noise.sample(k, x.shape[1:]))(keys)
    both = [jnp.asarray(v).reshape(len(x), -1)[:, :3] for v in (x, z)]
    errors, root = {}, np.sqrt(len(x))
    for label, phi in SPACE.items():
        ours, noise = (np.asarray(jax.vmap(phi)(v)) for v in both)
        spread = np.sqrt(ours.var() + noise.var())
        errors[f"phi = {label}"] = abs(ours.mean() - noise.mean()) * root / spread
    return worst("terminal", "noise end", what, errors, _BAR + _BIAS * root)
