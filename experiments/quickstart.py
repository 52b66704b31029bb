"""Real handwritten digits from noise, in a minute or two on a laptop CPU.

    python experiments/quickstart.py
    python experiments/quickstart.py process:vp optimizer:lion --steps 2000
    python experiments/quickstart.py network:mlp --network.width 256 --batch-size 256

Trains on one half of the 1,797 8x8 scans that scikit-learn carries, samples by the
probability-flow ODE and by the reverse SDE, and compares with the other half: exact W2
in pixels scaled to [-1, 1], unbiased RBF MMD^2 (summed over the bandwidths 1 to 5), and
the mean distance to the nearest training image, which a memorising model would bring
towards 0. The floor of each is the same figure for the real training half.

Expect, on two CPU cores, 90 to 190 s of CPU time for training, W2 2.9 or less (floor
2.6), MMD^2 0.007 or less and nearest 2.4; a Gaussian fit has 3.5, 0.075 and 3.3.
Pictures in --out: early.png (a quarter of the way), samples.png, flow.png, loss.png.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import equinox as eqx
import jax
import numpy as np

import sdegen
from sdegen import cli, metrics, nets, prediction, times
from sdegen.data import digits
from sdegen.runs import Recorder, plots, table


@dataclass(frozen=True)
class Config:
    process: (
        sdegen.RectifiedFlow
        | sdegen.VP
        | sdegen.SubVP
        | sdegen.VE
        | sdegen.Cosine
        | sdegen.DDPM
        | sdegen.EDM
        | sdegen.FlowMatching
    ) = field(default_factory=sdegen.RectifiedFlow)
    """How data turn into noise."""
    network: nets.UNetConfig | nets.MLPConfig = nets.UNetConfig(channels=24)
    """What predicts the way back."""
    optimizer: sdegen.AdamW | sdegen.Lion = field(
        default_factory=lambda: sdegen.AdamW(learning_rate=3e-3, warmup=50)
    )
    """How it learns."""
    steps: int = 1800
    """Training steps."""
    batch_size: int = 64
    """Images per step."""
    ema: float = 0.998
    """Decay of the averaged network, which is the one that samples."""
    sampling_steps: int = 32
    """Steps of the flow, one evaluation each; the SDE takes twice as many of two."""
    draws: int = 3
    """Sets of samples over which the figures are averaged, with a standard error."""
    seed: int = 0
    """Of the data's halves, the network, the training and the samples."""
    quick: bool = False
    """A run of seconds that only shows that everything works."""
    out: Path = Path("runs/quickstart")
    """Directory for config.json, rows.jsonl and the pictures."""


def distances(sets, train, held) -> dict[str, float]:
    """Each figure's mean over `sets` of images, and the standard error of MMD^2."""
    sets = [np.clip(np.asarray(images), -1, 1) for images in sets]
    mmd2 = [
        sum(metrics.mmd2(images, held, bandwidth=h) for h in (1, 2, 3, 4, 5))
        for images in sets
    ]
    return {
        "W2": float(np.mean([metrics.w2(images, held) for images in sets])),
        "MMD2": float(np.mean(mmd2)),
        "+-": float(np.std(mmd2) / max(1, len(sets) - 1) ** 0.5),
        "nearest": float(np.mean([metrics.nearest(images, train) for images in sets])),
    }


def main(config: Config) -> None:
    small = nets.UNetConfig(channels=8, multiples=(1,))
    config = cli.shrink(config, network=small, steps=20, sampling_steps=4, draws=1)
    (train, _), (held, _) = digits(config.seed)
    held = held[: len(train)]
    key = jax.random.key(config.seed)
    network = config.network(train.shape[1:], jax.random.fold_in(key, 0))
    size = sum(leaf.size for leaf in jax.tree.leaves(network))
    # Velocity and uniform times where the data shrink; where only the noise grows,
    # VE and EDM, its scale would dominate both.
    straight = float(config.process.alpha(config.process.t_max)) < 0.5
    predicted = prediction.velocity if straight else prediction.edm
    draw = times.Uniform() if straight else times.FlowTime()
    model = sdegen.Denoiser(network, config.process, predicted, train.std())
    name, net = type(config.process).__name__, type(network).__name__
    print(f"{name}, {net} of {size:,} parameters, {len(train)} images")

    reverse = sdegen.LogSNRGrid(2 * config.sampling_steps)
    grids = {"flow": config.sampling_steps, "reverse SDE": reverse}

    def draw_set(sampler, model, number):
        return sdegen.sample(
            jax.random.fold_in(key, number),
            model,
            held.shape,
            grid=grids[sampler],
            stochasticity=float(sampler != "flow"),
            trajectory=sampler == "flow",
        )

    early = config.out / "early.png"

    def watch(step, model):
        if step >= config.steps / 4 and not early.exists():
            title, images = f"after {step} steps", draw_set("flow", model, 1).x
            plots.image_grids(early, {title: images})
            print(f"\na first picture, {title}: {early}")

    early.unlink(missing_ok=True)
    with Recorder(config.out, config) as recorder:
        cpu = time.process_time()
        fit = sdegen.fit(
            model,
            train,
            steps=config.steps,
            batch_size=config.batch_size,
            seed=config.seed,
            optimizer=config.optimizer,
            loss=eqx.Partial(sdegen.denoising_loss, times=draw),
            ema=config.ema,
            recorder=recorder,
            watch=watch,
        )
        print(f"trained in {time.process_time() - cpu:.0f} s of CPU time")
        flat = train.reshape(len(train), -1)
        random = np.random.default_rng(config.seed)
        gaussian = [
            random.multivariate_normal(flat.mean(0), np.cov(flat.T), len(held))
            for _ in range(config.draws)
        ]
        gaussian = [images.reshape(held.shape) for images in gaussian]
        empty = {"process": "-", "evaluations": 0, "seconds": 0.0}
        rows = [
            {"sampler": "real half"} | empty | distances([train], train, held),
            {"sampler": "Gaussian"} | empty | distances(gaussian, train, held),
        ]
        images = {"real": held}
        for sampler in grids:
            began, sets = time.perf_counter(), []
            for draw in range(config.draws):
                out = draw_set(sampler, fit.model, 1 + draw)
                sets.append(np.asarray(out.x))
            seconds = (time.perf_counter() - began) / config.draws
            if not bool(out.ok.all()):
                raise ValueError(f"the {sampler} did not reach the data: {out.result}")
            row = {"sampler": sampler, "process": name}
            row |= {"evaluations": int(out.evaluations), "seconds": seconds}
            rows.append(row | distances(sets, train, held))
            images[sampler] = sets[-1]
            if out.trajectory is not None:
                title = f"{name}: from noise to digits along the probability flow"
                file = config.out / "flow.png"
                plots.image_flow(file, out.trajectory, out.times, title=title)
        for row in rows:
            recorder.row(**row)
        plots.image_grids(config.out / "samples.png", images)
        how = {"xlabel": "step", "ylabel": "loss", "smooth": max(1, config.steps // 50)}
        plots.curves(config.out / "loss.png", {"loss": fit.losses}, **how)
    print("\n" + table(rows))
    print(f"Means of {config.draws} sets (seconds: compilation included); +- is the")
    print("standard error of MMD2. The real half is its own nearest neighbour.")
    print(f"pictures: {config.out}/early.png, samples.png, flow.png, loss.png")


if __name__ == "__main__":
    cli.run(main, Config)
