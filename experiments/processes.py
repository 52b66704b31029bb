"""One network under every process, each sampled by its flow and by its SDE.

    python experiments/processes.py
    python experiments/processes.py --seeds 1 --steps 5000 --network.width 256

Trains the same network on eight Gaussians on a ring, with unequal weights, under every
built-in process: scalar ones, one with a noise level for each frequency (Blurring), one
with momentum (CLD, also run in its whole state), heavy-tailed and compact noise, a
learned schedule, a stochastic interpolant. All but the interpolant, which learns a
velocity, and PFGM, whose noise has no variance, have the same prediction, weight and
distribution of log(sigma/alpha), so that only the process differs. The table gives
exact W2 to fresh data, mean and standard deviation over seeds; the floor is the same
figure between two sets of real data.

Expect, in about 15 minutes on two CPU cores, every W2 within 1.5 times the floor, but
for PFGM, `PoissonFlow(1)`: .6, its modes not yet apart. Pictures: samples.png, loss.png
in --out.
"""

from dataclasses import dataclass, field
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import numpy as np

import sdegen
from sdegen import cli, metrics, nets, prediction, solvers, times
from sdegen.data import ring
from sdegen.runs import Recorder, plots, table


@dataclass(frozen=True)
class Config:
    network: nets.MLPConfig = nets.MLPConfig(width=128, depth=3)
    """The network, the same for every process."""
    optimizer: sdegen.AdamW | sdegen.Lion = field(
        default_factory=lambda: sdegen.AdamW(learning_rate=2e-3)
    )
    """How it learns."""
    steps: int = 2000
    """Training steps for each process."""
    batch_size: int = 256
    """Points per step."""
    points: int = 1000
    """Points per set when distances are measured."""
    sampling_steps: int = 48
    """Steps of UniPC (flow), one evaluation each, and of ShARK (SDE), two each."""
    state_steps: int = 200
    """Steps in the state of CLD, and of the interpolant, which have no fast solver."""
    seeds: int = 3
    """Runs of each process, with networks, training and samples of their own."""
    only: tuple[str, ...] = ()
    """Names of processes (empty: all)."""
    quick: bool = False
    """A run of seconds that only shows that everything works."""
    out: Path = Path("runs/processes")
    """Directory for config.json, rows.jsonl and the pictures."""


PATHS = [
    sdegen.VP(),
    sdegen.SubVP(),
    sdegen.VE(),
    sdegen.EDM(),
    sdegen.Cosine(),
    sdegen.FlowMatching(),
    sdegen.RectifiedFlow(),
    sdegen.LinearSDE(),
    sdegen.Blurring((2,), axes=(-1,), blur=1.0),
    sdegen.CLD(),
    sdegen.PoissonFlow(128),
    sdegen.GreenFlow(),
    sdegen.StraightFlow(),
]


def signal_to_noise(path, t, prediction, sigma_data):
    """The weight alpha / sigma on the error of x0."""
    return path.alpha(t) / path.sigma(t)


def models(config, network, size):
    """Name -> what `fit` trains, with its loss (None: its own)."""
    draws = times.LogNormal(-0.5, 1.4)
    loss = eqx.Partial(sdegen.denoising_loss, times=draws)
    found = {}
    for path in PATHS:
        name = type(path).__name__
        if isinstance(path, sdegen.PoissonFlow):
            name = f"{name}({float(path.dof):g})"
        found[name] = sdegen.Denoiser(network, path, sigma_data=size), loss
    # noise without a variance: see `nets.HeavyTailed`
    heavy, path = nets.HeavyTailed(network, size), sdegen.PoissonFlow(1)
    wide = {"times": times.LogNormal(0.3, 2.0), "weight": signal_to_noise}
    found["PoissonFlow(1)"] = (
        sdegen.Denoiser(heavy, path, prediction.x0, sigma_data=size),
        eqx.Partial(sdegen.denoising_loss, **wide),
    )
    found["LearnedSchedule"] = sdegen.VDM(network, sigma_data=size), None
    interpolant = sdegen.StochasticInterpolant()
    model = sdegen.VelocityModel(network, interpolant, network)
    found["StochasticInterpolant"] = model, None
    chosen = config.only or (("CLD",) if config.quick else tuple(found))
    return {name: found[name] for name in chosen}


def samplers(config, model):
    """Name -> (what is sampled, options of `sample`)."""
    steps, noisy = config.state_steps, {"stochasticity": 1.0}
    if isinstance(model, sdegen.VelocityModel):
        grid = {"grid": steps}
        return {"flow": (model, grid), "SDE": (model, grid | noisy)}
    grid = sdegen.LogSNRGrid(config.sampling_steps)
    found = {"flow": (model, {"solver": solvers.UniPC(), "grid": grid})}
    if model.path.noise.gaussian:
        found["SDE"] = model, {"solver": diffrax.ShARK(), "grid": grid} | noisy
    if isinstance(model.path, sdegen.AbstractBlockSDE):
        state = {"solver": solvers.SSCS(), "grid": steps} | noisy
        found["SDE of the state"] = sdegen.Augmented(model), state
    return found


def main(config: Config) -> None:
    small = {"seeds": 1, "state_steps": 8, "points": 200}
    config = cli.shrink(config, steps=20, sampling_steps=8, **small)
    sizes, keys = (20_000, config.points, config.points), jax.random.key(0)
    sets = map(ring().sample, jax.random.split(keys, 3), sizes)
    data, real, other = map(np.asarray, sets)
    floor, losses, found = metrics.w2(other, real), {}, {}
    clouds = {"data": real, "fresh data": other}
    with Recorder(config.out, config) as recorder:
        for seed in range(config.seeds):
            key = jax.random.key(seed + 1)
            network = config.network((2,), key)
            for name, (model, loss) in models(config, network, data.std()).items():
                print(f"{name}, seed {seed}")
                fit = sdegen.fit(
                    model,
                    data,
                    steps=config.steps,
                    batch_size=config.batch_size,
                    seed=seed,
                    optimizer=config.optimizer,
                    loss=loss,
                    steps_per_call=500,
                )
                losses[name] = fit.losses
                for sampler, (what, options) in samplers(config, fit.model).items():
                    out = sdegen.sample(key, what, real.shape, **options)
                    row = {"process": name, "sampler": sampler, "seed": seed}
                    row |= {"evaluations": int(out.evaluations)}
                    row |= {"W2": metrics.w2(out.x, real), "ok": bool(out.ok.all())}
                    recorder.row(**row)
                    found.setdefault((name, sampler), []).append(row)
                    clouds[f"{name}, {sampler}"] = out.x
    rows = []
    for (name, sampler), runs in found.items():
        w2 = np.array([run["W2"] for run in runs])
        rows.append({"process": name, "sampler": sampler} | {"floor": floor})
        rows[-1] |= {"evaluations": runs[0]["evaluations"], "W2": float(w2.mean())}
        rows[-1] |= {"+-": float(w2.std())}
    plots.point_clouds(config.out / "samples.png", clouds, columns=8, limit=3.0)
    how = {"xlabel": "step", "ylabel": "loss", "smooth": max(1, config.steps // 50)}
    plots.curves(config.out / "loss.png", losses, **how)
    print("\n" + table(rows))
    print(f"pictures: {config.out}/samples.png, loss.png")


if __name__ == "__main__":
    cli.run(main, Config)
