"""What a sampler costs beside its network evaluations: ratios, from one run.

    python experiments/bench_sampling.py

Each sampler runs a UNet on a batch of digits-sized images; the unit is (evaluations x
one jitted network call), in process CPU time and in turn with it. Expect at most 1.05:
sampling costs its network evaluations and nothing else; noise that is the same at every
number of steps is the exception. Then, against a loop of Euler steps written by hand
with `jax.lax.scan`: the time to trace and compile (expect at most 3), and the memory of
a gradient through the sampler (expect a tenth: a state per step and one step's layers,
where the loop keeps the layers of every step).
"""

import time
from dataclasses import dataclass

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import sdegen
from sdegen import cli, nets, prediction, solvers
from sdegen.runs import table


@dataclass(frozen=True)
class Config:
    network: nets.UNetConfig | nets.MLPConfig = nets.UNetConfig()
    """The network."""
    batch_size: int = 64
    """Images in the batch."""
    steps: int = 8
    """Steps of the fixed grids."""
    rounds: int = 9
    """Measurements of each, in turn."""
    quick: bool = False
    """A run of seconds that only shows that everything works."""


def main(config: Config) -> None:
    small = nets.MLPConfig(width=16, depth=1)
    config = cli.shrink(config, network=small, steps=2, rounds=1, batch_size=8)
    shape, key = (config.batch_size, 8, 8, 1), jax.random.key(0)
    network = config.network(shape[1:], key)
    grid, cases = sdegen.LogSNRGrid(config.steps), {}
    processes = sdegen.RectifiedFlow(), sdegen.VP()
    flow, vp = (sdegen.Denoiser(network, process) for process in processes)
    adaptive = sdegen.Adaptive(1e-3, 1e-3)

    def case(denoiser, solver, steps=grid, stochasticity=0.0, **options):
        kind = "SDE" if stochasticity else "flow"
        extra = ", refinable" if options else ""
        extra += ", adaptive" if steps is adaptive else ""
        name = f"{type(denoiser.path).__name__} {kind}, {type(solver).__name__}{extra}"
        options |= {"solver": solver, "grid": steps, "stochasticity": stochasticity}
        cases[name] = lambda: sdegen.sample(key, denoiser, shape, **options)

    case(flow, diffrax.Heun())
    case(vp, diffrax.Heun())
    case(vp, solvers.DDIM())
    case(vp, solvers.DPMSolverPP())
    case(vp, solvers.UniPC())
    case(flow, solvers.UniPC(2, prediction=prediction.velocity))
    case(vp, solvers.EDMHeun())
    case(vp, diffrax.Tsit5(), adaptive)
    case(vp, solvers.ExponentialAdams(), adaptive)
    case(vp, diffrax.ShARK(), stochasticity=1.0)
    case(vp, solvers.DPMSolverSDE(), stochasticity=1.0)
    case(vp, solvers.ERSDE(), stochasticity=1.0)
    case(vp, solvers.DPMSolverSDE(), stochasticity=1.0, refinable=True)
    if config.quick:
        cases = dict(list(cases.items())[3:5])
    x, t = jax.random.normal(key, shape), jnp.zeros(shape[:1])
    # Parameters as arguments, as in the sampler: baked in as constants they run faster.
    leaves, structure = jax.tree.flatten(network)

    @jax.jit
    def one_call(leaves, t, x):
        return jax.tree.unflatten(structure, leaves)(t, x, None)

    def clock(run, repeat=1):
        began = time.process_time()
        for _ in range(repeat):
            jax.block_until_ready(run())
        return (time.process_time() - began) / repeat

    jax.block_until_ready(one_call(leaves, t, x))
    counts = {name: int(run().evaluations) for name, run in cases.items()}
    ratios, unit = {name: [] for name in cases}, []
    for _ in range(config.rounds):
        for name, run in cases.items():
            one = clock(lambda: one_call(leaves, t, x), repeat=10)
            unit.append(one)
            ratios[name].append(clock(run) / (counts[name] * one))
    rows = []
    for name, values in ratios.items():
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        row = {"sampler": name, "evaluations": counts[name], "ratio": median}
        rows.append(row | {"quartiles": f"{low:.3f} to {high:.3f}"})
    print(f"one network call: {1e3 * np.median(unit):.2f} ms of CPU time")
    print(table(rows))
    print("\n" + table(compile_and_memory(config, network, shape)))


def by_hand(network, path, ts, x):
    """Euler's method on the probability flow, as one would write it."""

    def step(x, times):
        t, s = times
        velocity = sdegen.Denoiser(network, path).velocity(t, x)
        return x + (s - t) * velocity, None

    return jax.lax.scan(step, x, (ts[:-1], ts[1:]))[0]


def compile_and_memory(config, network, shape):
    """Ratios of compile times, and the temporaries of a gradient."""
    path, x = sdegen.VP(), jnp.zeros(shape)
    grid = sdegen.LogSNRGrid(config.steps)

    def sampler(solver):
        def run(network, x):
            denoiser = sdegen.Denoiser(network, path)
            options = {"solver": solver, "grid": grid, "start": x}
            return sdegen.sample(jax.random.key(0), denoiser, shape, **options).x

        return run

    loops = {
        "scan by hand": lambda network, x: by_hand(network, path, grid(path), x),
        "Euler": sampler(diffrax.Euler()),
        "DDIM": sampler(solvers.DDIM()),
        "DPMSolverPP": sampler(solvers.DPMSolverPP()),
        "UniPC": sampler(solvers.UniPC()),
    }
    seconds = {name: [] for name in loops}
    loops = dict(list(loops.items())[:2]) if config.quick else loops
    for i in range(1 if config.quick else 3):
        for name, run in loops.items():
            # a fresh function each time, or the trace would be remembered
            fresh = jax.jit(lambda network, x, run=run, i=i: run(network, x))
            began = time.process_time()
            fresh.lower(network, x).compile()
            seconds[name].append(time.process_time() - began)
            jax.clear_caches()
    rows = []
    for name, run in loops.items():

        def reward(network, x, run=run):
            return jnp.sum(run(network, x) ** 2)

        gradient = jax.jit(jax.grad(reward, 1)).lower(network, x).compile()
        size = gradient.memory_analysis().temp_size_in_bytes
        ratio = np.median(seconds[name]) / np.median(seconds["scan by hand"])
        rows.append({"loop": name, "compile": ratio, "gradient, MB": size / 1e6})
    return rows


if __name__ == "__main__":
    cli.run(main, Config)
