"""Digits in one step: a rectified flow, the flow of its own pairs, and distillation.

    python experiments/reflow.py
    python experiments/reflow.py --coupling exact

Trains a rectified flow on one half of the 8x8 digits, lets it make pairs of noise and
digit, trains the next flow on these, and on the pairs of that one a network for the
first velocity alone (Liu et al. 2023, "Flow straight and fast"). All are sampled from
the same noise, by 1, 2, 4 and 8 steps of Euler's method; the flow itself is 32 steps of
the default solver.

The table gives exact W2 to the held-out half, MMD^2 as in quickstart.py with its
standard error, and `off`, the mean distance of a sample to where the flow takes the
same noise (of the distilled one: the flow that it learned from). Of a flow's pairs:
`cost`, E|x1 - x0|^2, and `straightness`, 0 if straight. W2 is kind to blurred images,
which are nearer to all others: judge few steps by MMD^2 and off.

Expect, on two CPU cores, in ten minutes of CPU time, much of it compilation,
straightness 9.5 (3.4 with exact coupling), then .34; cost 71.6, then 70.6; and, with
the floor of W2 at 2.6,

                    W2 in 1, 32 steps  MMD^2 in 1, 32 steps  off in 1, 8 steps
    1-rectified         4.12, 2.97           2.2, .005            4.1, .56
    1-rectified, exact  3.13, 2.88           .54, .005            2.4, .36
    2-rectified         3.09, 3.00          .015, .007            .85, .16
    distilled           3.05                .010                  .58

The price is at the end of the flow, where MMD^2 went from .005 to .007: a flow learns
from the errors of the one before. Picture: steps.png in --out.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import diffrax
import equinox as eqx
import jax
import numpy as np

import sdegen
from sdegen import cli, coupling, metrics, nets, prediction, times
from sdegen.data import digits
from sdegen.runs import Recorder, plots, table

FINE = 32  # steps of the default solver: the flow itself


@dataclass(frozen=True)
class Config:
    coupling: Literal["independent", "exact"] = "independent"
    """Which noise goes with which digit in the first round; exact: transport."""
    network: nets.UNetConfig | nets.MLPConfig = nets.UNetConfig(channels=16)
    """What predicts the velocity."""
    optimizer: sdegen.AdamW | sdegen.Lion = field(
        default_factory=lambda: sdegen.AdamW(learning_rate=3e-3, warmup=50)
    )
    """How it learns."""
    steps: int = 1000
    """Training steps of each round, and of the distillation."""
    batch_size: int = 64
    """Images, or pairs, per step."""
    ema: float = 0.998
    """Decay of the averaged network, which is the one that samples."""
    pairs: int = 4096
    """Pairs that each flow makes."""
    euler: tuple[int, ...] = (1, 2, 4, 8)
    """Steps of Euler's method, one evaluation each."""
    draws: int = 2
    """Sets of samples over which the figures are averaged, with a standard error."""
    seed: int = 0
    """Of the data's halves, the network, the training, the pairs and the samples."""
    quick: bool = False
    """A run of seconds that only shows that everything works."""
    out: Path = Path("runs/reflow")
    """Directory for config.json, rows.jsonl and the picture."""


def solved(config: Config, model, shape, counts) -> dict[int, np.ndarray]:
    """Samples, (draws, n, ...), by number of steps; the starts are always the same."""
    sets = {}
    for n in counts:
        how = {"grid": FINE}
        if n != FINE:
            how = {"solver": diffrax.Euler(), "grid": sdegen.UniformGrid(n)}
        draws = []
        for draw in range(config.draws):
            key = jax.random.key(config.seed + 1 + draw)
            out = sdegen.sample(key, model, shape, **how)
            if not bool(out.ok.all()):
                raise ValueError(f"{n} steps did not reach the data: {out.result}")
            draws.append(np.asarray(out.x))
        sets[n] = np.stack(draws)
    return sets


def figures(sets, held, targets=None) -> dict[str, float]:
    """W2, MMD^2 and its standard error, and how far from where the flow goes."""
    off = float("nan")
    if targets is not None:
        gaps = (sets - targets).reshape(len(sets) * len(held), -1)
        off = float(np.linalg.norm(gaps, axis=1).mean())
    sets = np.clip(sets, -1, 1)
    mmd2 = [
        sum(metrics.mmd2(images, held, bandwidth=h) for h in (1, 2, 3, 4, 5))
        for images in sets
    ]
    return {
        "W2": float(np.mean([metrics.w2(images, held) for images in sets])),
        "MMD2": float(np.mean(mmd2)),
        "+-": float(np.std(mmd2) / max(1, len(sets) - 1) ** 0.5),
        "off": off,
    }


def picture(path: Path, blocks: dict[str, dict[int, np.ndarray]], columns: int = 16):
    """A block for each flow, a line for each number of steps, a column a start."""
    from matplotlib.figure import Figure

    lines = [len(block) for block in blocks.values()]
    figure = Figure((9, 0.5 * sum(lines) + 0.4 * len(lines)), layout="constrained")
    axes = figure.subplots(len(blocks), 1, height_ratios=lines)
    for axis, (name, block) in zip(axes, blocks.items(), strict=True):
        images = np.stack([sets[0, :columns] for sets in block.values()])
        border = [(0, 0)] * 2 + [(1, 1)] * 2 + [(0, 0)]
        grid = 255 - plots.tile(np.pad(images, border, constant_values=-1))
        axis.imshow(grid)
        axis.set_title(name, loc="left", fontweight="bold")
        middles = (np.arange(len(block)) + 0.5) * len(grid) / len(block)
        axis.set_yticks(middles, [f"{n} step{'s' * (n > 1)}" for n in block])
        axis.set_xticks([])
        axis.tick_params(length=0)
    figure.savefig(path, dpi=150)


def main(config: Config) -> None:
    quick = {"steps": 20, "pairs": 256, "euler": (1, 2), "draws": 1}
    config = cli.shrink(config, network=nets.MLPConfig(16, 1), **quick)
    (train, _), (held, _) = digits(config.seed)
    held = held[: len(train)]
    key = jax.random.key(config.seed)
    network = config.network(train.shape[1:], jax.random.fold_in(key, 0))
    model = sdegen.Denoiser(
        network, sdegen.RectifiedFlow(), prediction.velocity, sigma_data=train.std()
    )
    how = {"steps": config.steps, "batch_size": config.batch_size, "ema": config.ema}
    how |= {"optimizer": config.optimizer, "seed": config.seed}
    exact = config.coupling == "exact"
    first = coupling.ExactOT() if exact else coupling.independent
    moved = {"cost": float("nan"), "straightness": float("nan")}
    rows = [{"flow": "real half", "steps": 0} | figures(train[None], held) | moved]
    blocks = {}
    how_pairs = {"n": config.pairs, "pairs": {"grid": FINE // 2, "batch_size": 512}}
    loss = eqx.Partial(sdegen.denoising_loss, coupling=first)
    start = jax.random.fold_in(key, 1)
    rounds = sdegen.rectify(start, model, train, loss=loss, **how_pairs, **how)
    for number, model, pairs in rounds:
        sets = solved(config, model, held.shape, (*config.euler, FINE))
        cost, bend = pairs.transport_cost, pairs.straightness
        for n, images in sets.items():
            row = {"flow": f"{number}-rectified", "steps": n}
            row |= figures(images, held, sets[FINE])
            rows.append(row | {"cost": cost, "straightness": bend})
        blocks[f"{number}-rectified flow"] = sets
    # The last model and its pairs: only the velocity at the start of a path is learned.
    pairing = {"coupling": coupling.paired, "times": times.EulerTimes(1)}
    loss = eqx.Partial(sdegen.denoising_loss, **pairing)
    student = sdegen.fit(model, pairs.stream, loss=loss, **how).model
    one = solved(config, student, held.shape, (1,))
    last = {"flow": "distilled", "steps": 1}
    rows.append(last | figures(one[1], held, sets[FINE]) | moved)
    blocks["one-step distillation of the 2-rectified flow"] = one
    with Recorder(config.out, config) as recorder:
        for row in rows:
            recorder.row(**row)
    picture(config.out / "steps.png", blocks)
    print("\n" + table(rows))
    print(f"picture: {config.out}/steps.png")


if __name__ == "__main__":
    cli.run(main, Config)
