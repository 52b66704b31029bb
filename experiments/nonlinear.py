"""Nonlinear SDEs, trained by simulation and run backwards: double well and Lorenz.

    python experiments/nonlinear.py
    python experiments/nonlinear.py --seeds 1 --steps 500

A double well in either coordinate, dx = (x - x^3) dt + dw, carries a small skewed
cloud into its wells; a stochastic Lorenz system, scaled by 1/10, stretches a ring along
its attractor. Neither has a path alpha x0 + sigma z. The score is learned on simulated
paths by three losses; the reverse SDE carries the samples at t_max back to the data.
The table: exact W2 and energy distance to fresh data, mean and standard deviation over
seeds, without samples that were lost (not finite); the floor is real against real.

Expect no lost sample and W2 of .10 to .13 for Lorenz (floor .08), .13 to .23 for the
well (floor .07: a few samples between the modes), in about 6 minutes on two CPU cores.
Pictures: well.png and lorenz.png in --out, in x and y: data, the samples at t_max,
their way back, and the end by each loss.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sdegen
from sdegen import cli, metrics, nets
from sdegen.data import Mixture, ring
from sdegen.runs import Recorder, plots, table

LOSSES = {
    "simulated": sdegen.simulated_score_loss,
    "implicit": sdegen.implicit_score_loss,
    "sliced": sdegen.sliced_score_loss,
}


@dataclass(frozen=True)
class Config:
    network: nets.MLPConfig = nets.MLPConfig(width=64, depth=2)
    """The network, the same for both systems and all losses."""
    steps: int = 800
    """Training steps of every run."""
    batch_size: int = 128
    """Simulated paths per step."""
    path_steps: int = 60
    """Steps of Euler-Maruyama in training."""
    sampling_steps: int = 200
    """Steps of the reverse SDE."""
    points: int = 1000
    """Points per set when distances are measured."""
    seeds: int = 3
    """Runs of the simulated loss; the other two losses have one."""
    quick: bool = False
    """A run of seconds that only shows that everything works."""
    out: Path = Path("runs/nonlinear")
    """Directory for config.json, rows.jsonl and the pictures."""


def well_drift(t, x, noise):
    return x - x**3


def lorenz_drift(t, x, noise):
    """The system of 1963, with x / 10 in place of x."""
    a, b, c = x
    return jnp.stack([10 * (b - a), 28 * a - b - 10 * a * c, 10 * a * b - 8 / 3 * c])


def diffusion(t, x, noise):
    return noise


def systems():
    """Name -> (SDE, distribution of the data)."""
    cloud = Mixture([0.2, 0.3, 0.5], [[0.6, 0.9], [-0.3, 0.2], [0.3, -0.8]], [0.1] * 3)
    flat = ring(modes=5, radius=0.5, std=0.1)
    means = jnp.pad(flat.means, ((0, 0), (0, 1))) + jnp.array([0.0, 0.0, 2.4])
    five = Mixture(flat.weights, means, flat.stds)
    well = sdegen.CustomSDE(well_drift, diffusion, 1.0, t_max=1.5)
    lorenz = sdegen.CustomSDE(lorenz_drift, diffusion, 1.5, t_max=0.3)
    return {"well": (well, cloud), "lorenz": (lorenz, five)}


def train(config, loss, sde, data, prior, seed):
    """A model of the score, and samples of it with the states on their way."""
    key = jax.random.key(seed)
    network = config.network(data.shape[1:], key)
    how = {"steps": config.path_steps, "prior": prior}
    model = sdegen.ScoreModel.from_data(network, sde, data, key, **how)
    model = sdegen.fit(
        model,
        data,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=seed,
        loss=loss,
        optimizer=sdegen.AdamW(learning_rate=3e-3),
        steps_per_call=500,
    ).model
    shape, steps = (config.points, *data.shape[1:]), config.sampling_steps
    how = {"stochasticity": 1.0, "grid": steps, "trajectory": True}
    return np.asarray(sdegen.sample(key, model, shape, **how).trajectory)


def main(config: Config) -> None:
    small = {"network": nets.MLPConfig(16, 1), "path_steps": 20, "points": 100}
    config = cli.shrink(config, steps=10, seeds=1, sampling_steps=100, **small)
    rows = []
    with Recorder(config.out, config) as recorder:
        for system, (sde, distribution) in systems().items():
            if config.quick and system == "lorenz":
                continue  # its reversal explodes until the score is learned
            sizes = (20_000, config.points, config.points)
            keys = jax.random.split(jax.random.key(9), 3)
            data, real, other = map(distribution.sample, keys, sizes)
            prior = sdegen.SimulatedPrior(sde, data, config.path_steps)
            found = {"fresh data (the floor)": [other]}
            for name, loss in list(LOSSES.items())[: 1 if config.quick else None]:
                seeds = range(config.seeds if name == "simulated" else 1)
                print(f"{system}, {name}: {len(seeds)} runs")
                outs = [train(config, loss, sde, data, prior, seed) for seed in seeds]
                found[name] = [frames[-1] for frames in outs]
            frames = outs[0]
            found["at t_max"] = [frames[0]]
            for name, clouds in found.items():
                kept = [x[np.isfinite(x).all(1)] for x in map(np.asarray, clouds)]
                w2 = np.array([metrics.w2(x, real[: len(x)]) for x in kept])
                energy = np.mean([metrics.energy_distance(x, real) for x in kept])
                lost = sum(map(len, clouds)) - sum(map(len, kept))
                figures = {"W2": float(w2.mean()), "+-": float(w2.std())}
                figures |= {"energy": float(energy), "lost": lost}
                rows.append({"system": system, "samples": name, **figures})
                recorder.row(**rows[-1])
            half, late = (frames[int(s * (len(frames) - 1))] for s in (0.5, 0.8))
            sets = {"data": real, "t_max": frames[0], "half way": half, "later": late}
            sets |= {name: found[name][0] for name in LOSSES if name in found}
            flat = {name: np.asarray(x)[:, :2] for name, x in sets.items()}
            plots.point_clouds(config.out / f"{system}.png", flat, columns=7)
    print("\n" + table(rows))
    print(f"pictures: {config.out}/*.png")


if __name__ == "__main__":
    cli.run(main, Config)
