"""One network and one loss under six processes, each sampled by its flow and its SDE.

    python experiments/processes.py
    python experiments/processes.py --steps 5000 --network.width 256

Trains the same network on eight Gaussians on a ring, with unequal weights, under VP,
sub-VP, VE, EDM, flow matching and rectified flow, with the same prediction (EDM's),
weight and law of log(sigma/alpha), so that only the process differs. The table gives
exact W2 to fresh data; the floor is the same figure between two sets of real data.

Expect, in about 2 minutes on two CPU cores, every W2 within 1.5 times the floor: in the
coordinates in which the sampler works all linear processes are one. Pictures:
samples.png, loss.png in --out.
"""

from dataclasses import dataclass, field
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import numpy as np

import sdegen
from sdegen import cli, metrics, nets, pictures, solvers, times
from sdegen.data import ring
from sdegen.record import Recorder, table


@dataclass(frozen=True)
class Config:
    network: nets.Mlp = nets.Mlp(width=128, depth=3)
    """The network, the same for every process."""
    optimizer: sdegen.AdamW | sdegen.Lion = field(
        default_factory=lambda: sdegen.AdamW(learning_rate=2e-3)
    )
    """How it learns."""
    steps: int = 3000
    """Training steps for each process."""
    batch_size: int = 256
    """Points per step."""
    points: int = 1000
    """Points per set when distances are measured."""
    sampling_steps: int = 48
    """Steps of UniPC (flow), one evaluation each, and of ShARK (SDE), two each."""
    seed: int = 0
    """Of data, networks, training and samples."""
    quick: bool = False
    """A run of seconds that only shows that everything works."""
    out: Path = Path("runs/processes")
    """Directory for config.json, rows.jsonl and the pictures."""


def main(config: Config) -> None:
    config = cli.shrink(config, steps=20, sampling_steps=8, points=200)
    key = jax.random.key(config.seed)
    law = ring()
    data = np.asarray(law.sample(jax.random.fold_in(key, 0), 20_000))
    real, other = (
        np.asarray(law.sample(jax.random.fold_in(key, i), config.points))
        for i in (1, 2)
    )
    floor = metrics.w2(other, real)
    network = config.network((2,), jax.random.fold_in(key, 3))
    loss = eqx.Partial(sdegen.denoising_loss, times=times.LogNormal(-0.5, 1.4))
    processes = [
        sdegen.VP(),
        sdegen.SubVP(),
        sdegen.VE(),
        sdegen.EDM(),
        sdegen.FlowMatching(),
        sdegen.RectifiedFlow(),
    ][: 2 if config.quick else None]
    rows, losses, clouds = (
        [],
        {},
        {"flow": {"data": real}, "SDE": {"fresh data": other}},
    )
    with Recorder(config.out, config) as recorder:
        for process in processes:
            name = type(process).__name__
            print(name)
            fit = sdegen.fit(
                sdegen.Denoiser(network, process, sigma_data=data.std()),
                data,
                steps=config.steps,
                batch_size=config.batch_size,
                seed=config.seed,
                optimizer=config.optimizer,
                loss=loss,
                steps_per_call=500,
            )
            losses[name] = fit.losses
            grid = sdegen.LogSNRGrid(config.sampling_steps)
            for sampler, solver, stochasticity in (
                ("flow", solvers.UniPC(), 0.0),
                ("SDE", diffrax.ShARK(), 1.0),
            ):
                out = sdegen.sample(
                    jax.random.fold_in(key, 4),
                    fit.denoiser,
                    real.shape,
                    solver=solver,
                    grid=grid,
                    stochasticity=stochasticity,
                )
                rows.append(
                    {
                        "process": name,
                        "sampler": sampler,
                        "evaluations": int(out.evaluations),
                        "loss": float(fit.losses[-config.steps // 5 :].mean()),
                        "W2": metrics.w2(out.x, real),
                        "floor": floor,
                    }
                )
                recorder.row(**rows[-1])
                clouds[sampler][f"{name}, {sampler}"] = out.x
        pictures.point_clouds(
            config.out / "samples.png",
            clouds["flow"] | clouds["SDE"],
            columns=1 + len(processes),
            limit=3.0,
        )
        pictures.curves(
            config.out / "loss.png",
            losses,
            xlabel="step",
            ylabel="loss",
            smooth=max(1, config.steps // 50),
        )
    print("\n" + table(rows))
    print(f"pictures: {config.out}/samples.png, loss.png")


if __name__ == "__main__":
    cli.run(main, Config)
