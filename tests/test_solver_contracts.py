"""What every fast solver keeps to, one by one: counts, batches, types, gradients.

The contracts share one program of each solver and one more of each with noise: data,
times, keys and strengths are arguments of a program.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import pytest
from flows import KEY, ExactMean, exact
from oracle import G1, Mixture1D, process

import sdegen
from sdegen import nets, prediction, solvers
from sdegen.solvers.solver import AbstractSemilinearSolver

FINALS = {
    name: cls
    for name, cls in vars(solvers).items()
    if inspect.isclass(cls)
    and issubclass(cls, AbstractSemilinearSolver)
    and not inspect.isabstract(cls)
}
"""Every solver that the package exports, default-constructible."""
NOISY = [name for name, cls in FINALS.items() if cls.family]
every_solver = pytest.mark.parametrize("solver", FINALS)
every_noisy_solver = pytest.mark.parametrize("solver", NOISY)


# -- one program a solver --------------------------------------------------------------

TRACED, RAN = [], []


class Counted(ExactMean):
    """An exact denoiser that counts its traces and its runs."""

    def __call__(self, t, x, cond):
        TRACED.append(1)
        jax.debug.callback(lambda: RAN.append(1))
        return super().__call__(t, x, cond)


PATH, FLOW = process("EDM"), process("RectifiedFlow")  # made before any tracing
TIMES = sdegen.LogSNRGrid(5)(PATH)
POINT = Mixture1D([0.5, 0.5], [1.5, 1.5], [0.0, 0.0])
Z = jnp.linspace(-2, 2, 7)[:, None]
"""The noise of seven starts."""


def run(solver, *, data=G1, ts=TIMES, key=KEY, z=Z, strength=0.0):
    solver = FINALS[solver]() if isinstance(solver, str) else solver
    law = (jnp.asarray(a) for a in (data.w, data.mu, data.s))
    denoiser = sdegen.PosteriorMean(Counted(PATH, *law), PATH)
    start = 1.5 + PATH.t_max * z
    options = {"solver": solver, "grid": ts, "start": start, "stochasticity": strength}
    return sdegen.sample(key, denoiser, start.shape, **options)


@every_solver
def test_evaluations_are_those_that_run(solver):
    made = FINALS[solver]()
    for strength in (0.0, 1.0) if made.family else (0.0,):
        RAN.clear()
        out = run(made, strength=strength)
        jax.effects_barrier()
        assert bool(out.ok.all())
        assert int(out.evaluations) == len(RAN) == 5 * made.calls + made.calls_first
    multistep = isinstance(
        made,
        solvers.DDIM
        | solvers.DPMSolverPP
        | solvers.DPMSolverSDE
        | solvers.DEIS
        | solvers.UniPC
        | solvers.ERSDE,
    )
    assert not multistep or len(RAN) == 5


@every_solver
def test_numbers_do_not_retrace(solver):
    made = FINALS[solver]()
    other = type(made)(sigma_data=0.4) if hasattr(made, "sigma_data") else made
    for strength in (0.0, 0.5) if made.family else (0.0,):
        before = run(made, strength=strength)
        TRACED.clear()
        again = run(
            other,
            data=POINT,
            ts=TIMES.at[2:4].multiply(1.1),
            key=jax.random.key(1),
            strength=1.6 * strength,
        )
        assert abs(again.x - before.x).min() > 1e-6
        assert not TRACED


@every_solver
def test_a_sample_does_not_depend_on_the_others(solver):
    for strength in (0.0, 1.0) if FINALS[solver].family else (0.0,):
        one, other = (run(solver, z=z, strength=strength) for z in (Z, Z.at[4:].add(1)))
        assert (one.x[:4] == other.x[:4]).all()
        assert abs(one.x[4:] - other.x[4:]).min() > 1e-6


def test_a_sample_does_not_depend_on_the_size_of_its_batch():
    few, many = (
        sdegen.sample(
            KEY, exact("VP"), (n, 1), solver=solvers.ERSDE(), grid=6, stochasticity=1.0
        ).x
        for n in (4, 32)
    )
    assert abs(few - many[:4]).max() < 1e-13


@pytest.mark.parametrize("solver", sorted(set(NOISY) - {"Langevin"}))
def test_a_strength_that_vanishes_is_the_flow(solver):
    # its square is 0: the program with noise, told to add none
    noisy, flow = (run(solver, strength=strength) for strength in (1e-300, 0.0))
    assert abs(noisy.x - flow.x).max() < 1e-12


POINTS = {
    name: cls() for name, cls in FINALS.items() if name not in ("UniPC", "Langevin")
}
del POINTS["ExponentialAdams"]  # it and UniPC work in edm, where a point is not ideal
POINTS |= {
    f"UniPC {kind}": solvers.UniPC(2, prediction=kind)
    for kind in (prediction.x0, prediction.eps, prediction.velocity)
}


@pytest.mark.parametrize("label", POINTS)
def test_one_point_comes_back_in_a_few_steps(label):
    out = run(POINTS[label], data=POINT)
    # the weights of the past multiply differences of rounding of 80
    assert abs(out.x - (1.5 + PATH.t_min * Z)).max() < 1e-10


# -- types, derivatives, platforms -----------------------------------------------------


def network(width=16):
    net = nets.MLPConfig(width=width, depth=1)((2,), jax.random.key(0))
    return jax.tree.map(
        lambda a: a + 0.05 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), net
    )


@pytest.mark.parametrize("solver", ["UniPC", "DPMSolverSDE", "EDMHeun"])
def test_time_and_state_stay_float32_with_a_bfloat16_network(solver, float32):
    solver, net = FINALS[solver](), network()

    def coarse(t, x, cond):
        assert t.dtype == x.dtype == jnp.float32
        return net(t, x, cond).astype(jnp.bfloat16)

    denoiser = sdegen.Denoiser(coarse, sdegen.RectifiedFlow(), prediction.velocity)
    out = sdegen.sample(KEY, denoiser, (4, 2), solver=solver, grid=9, trajectory=True)
    assert out.x.dtype == out.trajectory.dtype == out.times.dtype == jnp.float32
    rounded = out.trajectory.astype(jnp.bfloat16).astype(jnp.float32)
    assert (abs(out.trajectory - rounded).max(axis=(1, 2)) > 0).all()


@pytest.mark.parametrize(
    "solver", ["UniPC", "DPMSolver2", "EDMHeun", "DPMSolverSDE", "ERSDE"]
)
def test_gradients_flow_from_alpha_zero_to_the_data(solver):
    solver = FINALS[solver]()

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def end(scale, ts):
        law = exact(FLOW, shift=0.1 * scale)
        return jnp.sum(sdegen.sample(KEY, law, (3, 1), solver=solver, grid=ts).x)

    ts = jnp.asarray([1.0, 0.8, 0.5, 0.3, 0.1, 0.02])
    slope, times = end(1.0, ts)[1]
    step = 1e-6
    numeric = (end(1 + step, ts)[0] - end(1 - step, ts)[0]) / (2 * step)
    assert abs(slope - numeric) < 1e-6 * max(1, abs(numeric))
    assert jnp.isfinite(times).all()
    moved = ts.at[2].add(step), ts.at[2].add(-step)
    numeric = (end(1.0, moved[0])[0] - end(1.0, moved[1])[0]) / (2 * step)
    assert abs(times[2] - numeric) < 1e-5 * max(1, abs(numeric))


def test_gradients_of_noisy_solvers_are_finite_from_alpha_zero():
    """In the times, in the stochasticity, in the grid's numbers."""

    def end(solver, grid, strength):
        ts = grid if isinstance(grid, jax.Array) else grid(FLOW)
        law = exact(FLOW)
        options = {"solver": solver, "grid": ts, "stochasticity": strength}
        return jnp.sum(sdegen.sample(KEY, law, (3, 1), **options).x)

    ts = jnp.asarray([1.0, 0.7, 0.3, 0.02])
    for solver, strength in (
        (solvers.DDIM(), 1.0),
        (solvers.DPMSolverSDE(1), 0.5),
        (solvers.Langevin(), 0.5),
        (solvers.EDMHeun(s_churn=2.0), None),
    ):
        if strength is None:
            slopes = jax.jit(jax.grad(lambda ts, s=solver: end(s, ts, 0.0)))(ts)
        else:
            slopes = jax.jit(jax.grad(lambda *a, s=solver: end(s, *a), (0, 1)))(
                ts, strength
            )
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(slopes)), solver
    slope = jax.jit(
        jax.grad(lambda scale: end(solvers.UniPC(), sdegen.CosineGrid(4, scale), 0.0))
    )(0.5)
    assert jnp.isfinite(slope) and slope != 0


@pytest.mark.parametrize("solver", ["UniPC", "DPMSolverSDE", "EDMHeun", "ERSDE"])
def test_solvers_lower_for_accelerators(solver, float32):
    solver = FINALS[solver]()
    denoiser = sdegen.Denoiser(network(), sdegen.VP())
    strength = 1.0 if solver.family else 0.0
    make = jax.jit(
        lambda key: (
            sdegen.sample(
                key, denoiser, (8, 2), solver=solver, grid=4, stochasticity=strength
            ).x
        )
    )
    exported = jax.export.export(make, platforms=["cuda", "tpu"])(jax.random.key(0))
    assert exported.platforms == ("cuda", "tpu")


def test_a_mistake_is_answered_with_a_sentence():
    denoiser = exact("VP")
    sample = functools.partial(sdegen.sample, KEY, denoiser, (3, 1))
    for message, call in {
        "flow only": lambda: sample(solver=solvers.DEIS(), stochasticity=1.0),
        "error estimate": lambda: sample(
            solver=solvers.UniPC(), grid=sdegen.Adaptive()
        ),
        "whole number from 1 to 4": lambda: solvers.DEIS(5),
        "prediction of one of": lambda: solvers.UniPC(prediction=prediction.v),
        "solves what `sample` solves": lambda: sdegen.simulate(
            KEY, process("VP"), jnp.ones((2, 1)), solver=solvers.DDIM(), grid=4
        ),
        "refinable noise is that": lambda: sample(refinable=True),
        "needs bound=": lambda: solvers.analytic_variance(
            exact("RectifiedFlow"), jnp.ones((1, 2, 1)), jnp.ones(1)
        ),
        "stochasticity from 0 to 1": lambda: sample(
            solver=solvers.DDIM(), stochasticity=1.5
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# -- memory ----------------------------------------------------------------------------


def test_the_memory_of_a_gradient_grows_no_faster_than_the_steps(float32):
    net = network(64)

    def memory(steps):
        def end(net):
            denoiser = sdegen.Denoiser(net, sdegen.VP())
            grid = sdegen.LogSNRGrid(steps)
            out = sdegen.sample(
                jax.random.key(0),
                denoiser,
                (256, 2),
                solver=solvers.UniPC(),
                grid=grid,
            )
            return jnp.sum(out.x**2)

        compiled = jax.jit(jax.grad(end)).lower(net).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = memory(16), memory(64)
    print("temporaries", few, many)
    assert many < 4.5 * few
