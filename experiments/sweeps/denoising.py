"""What the sweeps of denoising networks share: a config and the trial it stands for."""

import functools
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import sdegen
from sdegen import metrics, nets, prediction, times, weight
from sdegen.data import digits, mixture
from sdegen.sweeps import Training


@dataclass(frozen=True)
class System:
    """A process, what is predicted on it, how errors are weighed and times drawn."""

    process: Any = field(default_factory=sdegen.RectifiedFlow)
    prediction: Any = prediction.velocity
    weight: Any = weight.uniform
    times: Any = field(default_factory=times.Uniform)


@dataclass(frozen=True)
class Config:
    """A denoising network on the ring of eight Gaussians, or on 8x8 digits."""

    data: str = "ring"
    system: System = field(default_factory=System)
    optimizer: Any = field(default_factory=sdegen.AdamW)
    width: int = 64
    depth: int = 2
    steps: int = 1000
    batch_size: int = 128
    ema: float = 0.99
    evaluations: int = 32
    quick: bool = False


@functools.cache
def sets(data: str):
    """(training samples, held-out samples) on the host."""
    if data == "ring":
        # Also when a trial is being traced: the data are the same for all of them.
        with jax.ensure_compile_time_eval():
            ring, keys = mixture.ring(), jax.random.split(jax.random.key(2026))
            return tuple(np.asarray(ring.sample(key, 4096)) for key in keys)
    (train, _), (held, _) = digits()
    return tuple(images.reshape(len(images), -1) for images in (train, held))


def trial(key, config: Config) -> Training:
    """The training of one config, judged by its samples and by the exact denoiser.

    `w2` is sliced W2 to the held-out samples; `error` the mean square error of the
    prediction in units of EDM's, from the exact one, on the ring alone, averaged over
    times uniform in the flow's clock.
    """
    train, held = sets(config.data)
    steps, system = 60 if config.quick else config.steps, config.system
    network = nets.MLPConfig(config.width, config.depth)(train.shape[1:], key)
    size = float(train.std())
    model = sdegen.Denoiser(network, system.process, system.prediction, size)
    how = {"weight": system.weight, "times": system.times}
    loss = eqx.Partial(sdegen.denoising_loss, **how)

    def evaluate(key, denoiser):
        grid = 4 if config.quick else config.evaluations
        start, pick = jax.random.split(key)
        out = sdegen.sample(start, denoiser, held.shape, grid=grid)
        found = {"w2": metrics.sliced_w2(pick, out.x, jnp.asarray(held)).value}
        if config.data == "ring":
            exact = mixture.ring().denoiser(denoiser.path)
            how = {"exact": exact, "times": times.FlowTime(), "weight": weight.edm}
            x0 = jnp.asarray(held)
            found["error"] = sdegen.denoising_loss(denoiser, pick, x0, **how)
        return found

    return Training(
        model,
        train,
        steps=steps,
        batch_size=config.batch_size,
        optimizer=config.optimizer,
        loss=loss,
        ema=config.ema,
        evaluate=evaluate,
    )
