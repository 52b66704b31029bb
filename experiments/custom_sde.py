"""Two equations of your own, linear and nonlinear, from data to noise and back.

Two minutes on two CPU cores; expect W2 of at most twice the floor (between real sets).
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

import sdegen
from sdegen import cli, metrics, nets
from sdegen.data import ring
from sdegen.runs import plots

# fmt: off
linear = sdegen.LinearSDE(  # dx = -k t x dt + sqrt(2 k t) dw
    f=lambda t, k: -k * t, g=lambda t, k: jnp.sqrt(2 * k * t), params=10.0)
nonlinear = sdegen.CustomSDE(  # dx = (-g^2 x / 2 + g g') dt + g(x) dw
    drift=lambda t, x, p: -0.5 * (1 + p * jnp.sin(x) ** 2) * x + p * jnp.sin(2 * x) / 2,
    diffusion=lambda t, x, p: jnp.sqrt(1 + p * jnp.sin(x) ** 2), params=1.0, t_max=5.0)

@dataclass(frozen=True)
class Config:
    steps: int = 1500  # training steps, for each equation
    quick: bool = False  # a run of seconds that only shows that everything works
    out: Path = Path("runs/custom_sde")  # directory of the picture

def main(config: Config) -> None:
    config, keys = cli.shrink(config, steps=20), jax.random.split(jax.random.key(0), 6)
    ring5, net = ring(modes=5, std=0.25), nets.MLPConfig(64, 2)((2,), keys[3])
    data, real, other = map(ring5.sample, keys[:3], (20000, 1000, 1000))
    learn = {"steps": config.steps, "optimizer": sdegen.AdamW(3e-3)}
    one = sdegen.fit(sdegen.Denoiser(net, linear), data, **learn).model
    two = sdegen.ScoreModel.from_data(net, nonlinear, data, keys[5])
    two = sdegen.fit(two, data, **learn).model
    sets = {"data": real, "linear": sdegen.sample(keys[4], one, real.shape).x}
    sets["nonlinear"] = sdegen.sample(keys[4], two, real.shape, stochasticity=1.0).x
    distances = {k: metrics.w2(v, real) for k, v in (sets | {"data": other}).items()}
    print("W2:", {k: round(v, 3) for k, v in distances.items()}, "(data: the floor)")
    print("picture:", plots.point_clouds(config.out / "samples.png", sets))

if __name__ == "__main__":
    cli.run(main, Config)
