"""The cost of a sampler over its network evaluations: ratios, from one interleaved run.

    python experiments/bench_sampling.py

Each sampler runs a UNet on a batch of digits-sized images; the unit is (evaluations x
one jitted network call), in process CPU time and in turn with it. Expect at most 1.05:
sampling costs its network evaluations and nothing else.
"""

import time
from dataclasses import dataclass

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import sdegen
from sdegen import cli, nets
from sdegen.record import table


@dataclass(frozen=True)
class Config:
    network: nets.Unet | nets.Mlp = nets.Unet()
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
    config = cli.shrink(config, steps=2, rounds=3)
    shape, key = (config.batch_size, 8, 8, 1), jax.random.key(0)
    network = config.network(shape[1:], key)
    grid, cases = sdegen.LogSNRGrid(config.steps), {}
    for process in (sdegen.RectifiedFlow(), sdegen.VP()):
        denoiser = sdegen.Denoiser(network, process)
        for solver, stochasticity, steps in (
            (diffrax.Euler(), 0.0, grid),
            (diffrax.Heun(), 0.0, grid),
            (diffrax.Tsit5(), 0.0, sdegen.Adaptive(1e-3, 1e-3)),
            (diffrax.Euler(), 1.0, grid),
            (diffrax.ShARK(), 1.0, grid),
        ):
            kind = "SDE" if stochasticity else "flow"
            name = f"{type(process).__name__} {kind}, {type(solver).__name__}"
            cases[name] = lambda d=denoiser, s=solver, g=steps, l=stochasticity: (
                sdegen.sample(key, d, shape, solver=s, grid=g, stochasticity=l)
            )
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
        rows.append(
            {
                "sampler": name,
                "evaluations": counts[name],
                "ratio": median,
                "quartiles": f"{low:.3f} to {high:.3f}",
            }
        )
    print(f"one network call: {1e3 * np.median(unit):.2f} ms of CPU time")
    print(table(rows))


if __name__ == "__main__":
    cli.run(main, Config)
