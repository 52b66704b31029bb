"""Real images from noise: any process, network, data and optimiser, by class or not.

    python experiments/images.py mnist
    python experiments/images.py fashion-mnist process:vp optimizer:lion
    python experiments/images.py cifar10 --mesh fsdp --network.dtype bfloat16

The data are looked for in --data-dir or $SDEGEN_DATA (docs/data.md). A run that was
stopped, by SIGTERM (code 75), kill or power, goes on where it was when the same command
is given again, on any number of devices: config.json, rows.jsonl, checkpoints and
samples are in --out. `sdegen report` compares runs.

Sampling is by the probability-flow ODE from the averaged network. `agreement` is the
share of images whose class, by the nearest of 10,000 training images, is the one asked
for; W2 (exact, over 1,000 images in [-1, 1]) has a floor, the same figure of real
training images against real test images.

Expect on two CPU cores, 1,400 steps of 64 images in 24 minutes (read at a glance after
15): `mnist` W2 13.2 (floor 12.9), agreement .89 (real test images .92); `fashion-mnist`
W2 12.4 (floor 10.8), agreement .61 (.80). `cifar10` is EDM's network for a machine with
accelerators (200 million images, as in the paper, whose FID is 1.97 without classes and
1.79 with them); it has not been run here.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax
import numpy as np

import sdegen
from sdegen import cli, data, metrics, nets, prediction, times
from sdegen.data import augment
from sdegen.mesh import batch_sharding, make_mesh, to_host
from sdegen.runs import plots, report, table, writers
from sdegen.training import ema as average


@dataclass(frozen=True)
class Config:
    data: Literal["digits", "mnist", "fashion-mnist", "cifar10"]
    """What to learn."""
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
    network: (
        nets.UNetConfig
        | nets.DDPMppConfig
        | nets.NCSNppConfig
        | nets.ADMConfig
        | nets.EDM2Config
        | nets.DiTConfig
        | nets.MLPConfig
    ) = nets.UNetConfig(channels=32, multiples=(1, 2, 2), blocks=1)
    """What predicts the way back."""
    optimizer: sdegen.AdamW | sdegen.Lion = field(
        default_factory=lambda: sdegen.AdamW(learning_rate=2e-3)
    )
    """How it learns."""
    steps: int = 1400
    """Training steps."""
    batch_size: int = 64
    """Images per step, over all devices."""
    accumulate: int = 1
    """Parts that a batch is worked off in, to save memory."""
    by_class: bool = True
    """Whether the network is told the class."""
    flip: bool = False
    """Whether images are mirrored at random."""
    ema: float = 0.10
    """Relative width of the averaged network that samples (power function)."""
    sampling_steps: int = 40
    """Steps of the flow, one evaluation each."""
    samples: int = 1000
    """Images drawn for the figures."""
    steps_per_call: int = 25
    """Training steps in one compiled call."""
    mesh: str = ""
    """Devices, as "data:8", "fsdp" or "data:2,fsdp:4"; empty: one device."""
    distributed: bool = False
    """Call jax.distributed.initialize first: one process per host of a cluster."""
    data_dir: Path | None = None
    """Where the data are; default $SDEGEN_DATA."""
    seed: int = 0
    """Of everything."""
    writers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where rows and pictures go besides the files."""
    profile: bool = False
    """Write a profiler's trace of three calls into --out."""
    quick: bool = False
    """A run of seconds that only shows that everything works."""
    out: Path = Path("runs/images")
    """Directory of the run."""


PRESETS = {
    "digits": Config(
        "digits", network=nets.UNetConfig(channels=24), out=Path("runs/images-digits")
    ),
    "mnist": Config("mnist", out=Path("runs/mnist")),
    "fashion-mnist": Config("fashion-mnist", flip=True, out=Path("runs/fashion-mnist")),
    "cifar10": Config(
        "cifar10",
        network=nets.DDPMppConfig(dropout=0.13),
        steps=390_000,
        batch_size=512,
        flip=True,
        steps_per_call=10,
        out=Path("runs/cifar10"),
    ),
}
LOADERS = {
    "mnist": data.mnist,
    "fashion-mnist": data.fashion_mnist,
    "cifar10": data.cifar10,
}


def load(config):
    """((training images, labels), (test images, labels)), images uint8."""
    if config.data == "digits":
        halves = data.digits(config.seed)
        return tuple((np.uint8((x + 1) * 127.5), y) for x, y in halves)
    splits = ("train", "test")
    return tuple(LOADERS[config.data](s, config.data_dir) for s in splits)


def floats(images):
    """Bytes as numbers in [-1, 1]."""
    return np.asarray(images, np.float32) / 127.5 - 1


def classify(images, known, labels):
    """The class of the nearest of the `known` images, in pixels."""
    images, known = (np.asarray(a).reshape(len(a), -1) for a in (images, known))
    squares = (known**2).sum(1)
    parts = np.array_split(images, max(1, len(images) // 250))
    nearest = [np.argmin(squares - 2 * part @ known.T, axis=1) for part in parts]
    return labels[np.concatenate(nearest)]


def sampler(config, shape, classes, mesh):
    """(key, denoiser, labels) -> images on the host, over the devices of the mesh."""
    sharding = None if mesh is None else batch_sharding(mesh)

    @jax.jit
    def draw(key, denoiser, cond):
        n, cond = len(cond), cond if config.by_class else None
        return sdegen.sample(
            key,
            denoiser,
            (n, *shape),
            grid=config.sampling_steps,
            cond=cond,
            sharding=sharding,
        ).x

    def images(key, denoiser, labels):
        cond = data.one_hot(labels, classes)
        return np.clip(to_host(draw(key, denoiser, cond)), -1, 1)

    return images


def main(config: Config) -> None:
    small = nets.UNetConfig(channels=8, multiples=(1,))
    config = cli.shrink(
        config, network=small, steps=20, steps_per_call=5, sampling_steps=4, samples=20
    )
    if config.distributed:
        jax.distributed.initialize()
    cli.compile_cache()
    mesh = make_mesh(config.mesh) if config.mesh else None
    (train, labels), (test, test_labels) = load(config)
    shape, classes = train.shape[1:], int(labels.max()) + 1
    key = jax.random.key(config.seed)
    network = config.network(
        shape, key, cond_dim=classes if config.by_class else 0, mesh=mesh
    )
    straight = float(config.process.alpha(config.process.t_max)) < 0.5
    denoiser = sdegen.Denoiser(
        network,
        config.process,
        prediction.velocity if straight else prediction.edm,
        sigma_data=float(floats(train[:10_000]).std()),
    )
    draws = times.Uniform() if straight else times.LogNormal()
    size = sum(leaf.size for leaf in jax.tree.leaves(network))
    name = type(config.process).__name__
    print(
        f"{name}, {type(network).__name__} of {size:,} parameters, {len(train):,} "
        f"images of {config.data}, {jax.device_count()} device(s)"
    )
    draw = sampler(config, shape, classes, mesh)
    shown = np.repeat(np.arange(classes), 8)  # a column for each class
    recorder = sdegen.Recorder(
        config.out,
        config,
        resume=True,
        free=("out", "mesh", "distributed", "data_dir", "writers", "profile"),
        writers=[
            writers.KINDS[w](config.out, config)
            for w in config.writers
            if jax.process_index() == 0
        ],
    )

    def look(step, model):
        images = draw(jax.random.fold_in(key, 1), model, shown)
        if jax.process_index() == 0:
            grid = plots.tile(images.reshape(classes, 8, *shape).swapaxes(0, 1))
            plots.write(config.out / "samples" / f"{step:08d}.png", grid)
            recorder.image(step, "samples", grid)

    with recorder:
        fit = sdegen.fit(
            denoiser,
            train,
            cond=data.one_hot(labels, classes) if config.by_class else None,
            steps=config.steps,
            batch_size=config.batch_size,
            seed=config.seed,
            optimizer=config.optimizer,
            loss=eqx.Partial(sdegen.denoising_loss, times=draws),
            ema=[average.Power(config.ema), average.Power(config.ema / 2)],
            augment=augment.flip if config.flip else None,
            accumulate=config.accumulate,
            steps_per_call=config.steps_per_call,
            mesh=mesh,
            recorder=recorder,
            directory=config.out,
            watch=look,
            profile=config.out / "profile" if config.profile else None,
        )
        n, random = config.samples, np.random.default_rng(config.seed)
        wanted = test_labels[:n]
        drawn = draw(jax.random.fold_in(key, 2), fit.model, wanted)
        known = random.permutation(len(train))[: max(10_000, n)]
        rest, held = floats(train[known[-n:]]), floats(test[:n])
        known, known_labels = floats(train[known[:-n]]), labels[known[:-n]]
        sets = {
            "samples": (drawn, wanted),
            "training images": (rest, None),
            "test images": (held, wanted),
        }
        rows = []
        for what, (images, asked) in sets.items():
            row = {"images": what, "W2": "-", "agreement": "-"}
            if what != "test images":
                row["W2"] = float(metrics.w2(images, held))
            if asked is not None and (config.by_class or what != "samples"):
                found = classify(images, known, known_labels)
                row["agreement"] = float(np.mean(found == asked))
            rows.append(row)
            recorder.row(**row)
    if jax.process_index() == 0:
        pairs = [(r["step"], r["loss"]) for r in report.read(config.out)["rows"]]
        steps, losses = np.array(pairs).T
        how = {"xlabel": "step", "ylabel": "loss", "smooth": max(1, len(steps) // 50)}
        plots.curves(config.out / "loss.png", {"loss": (steps, losses)}, **how)
    print("\n" + table(rows))
    print(f"pictures: {config.out}/samples/*.png, loss.png; rows: rows.jsonl")


if __name__ == "__main__":
    cli.run(main, Config, presets=PRESETS)
