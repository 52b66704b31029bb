"""Two equations of your own, linear and nonlinear, from data to noise and back.

Two minutes on two CPU cores; expect W2 of at most twice the floor (between real sets).
"""

from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp

import sdegen
from sdegen import cli, metrics, nets, pictures
from sdegen.data import ring

# fmt: off
linear = sdegen.LinearSDE(  # dx = -k t x dt + sqrt(2 k t) dw
    f=lambda t, k: -k * t, g=lambda t, k: jnp.sqrt(2 * k * t), params=10.0)
nonlinear = sdegen.CustomSDE(  # dx = (-g^2 x / 2 + g g') dt + g(x) dw
    drift=lambda t, x, p: -0.5 * (1 + p * jnp.sin(x) ** 2) * x + p * jnp.sin(2 * x) / 2,
    diffusion=lambda t, x, p: jnp.sqrt(1 + p * jnp.sin(x) ** 2),
    params=1.0, t_min=0.02, t_max=5.0)

class Score(eqx.Module):  # of the nonlinear SDE, for one sample
    network: object
    def __call__(self, t, x):
        return self.network(jnp.log(t), x[None], None)[0]

def implicit_loss(score, key, x0, cond, axis_name=None):  # Hyvarinen 2005
    grid = jnp.geomspace(0.02, 5.0, 33)
    out = sdegen.simulate(key, nonlinear, x0, grid=grid, trajectory=True)
    t, x = jnp.repeat(out.times, len(x0)), out.trajectory.reshape(-1, x0.shape[1])
    s, jacobian = jax.vmap(score)(t, x), jax.vmap(jax.jacfwd(score, argnums=1))(t, x)
    return jnp.mean(0.5 * jnp.sum(s**2, -1) + jnp.trace(jacobian, axis1=1, axis2=2))

@dataclass(frozen=True)
class Config:
    steps: int = 1500  # training steps, for each equation
    quick: bool = False  # a run of seconds that only shows that everything works
    out: Path = Path("runs/custom_sde")  # directory of the picture

def main(config: Config) -> None:
    config, keys = cli.shrink(config, steps=20), jax.random.split(jax.random.key(0), 6)
    law, net = ring(modes=5, std=0.25), nets.Mlp(width=64, depth=2)((2,), keys[3])
    data, real, other = (law.sample(keys[i], (20000, 1000, 1000)[i]) for i in range(3))
    model, noise = sdegen.Denoiser(net, linear), jax.random.normal(keys[5], real.shape)
    one = sdegen.fit(model, data, steps=config.steps).denoiser
    two = sdegen.fit(Score(net), data, steps=config.steps, loss=implicit_loss).denoiser
    back = sdegen.reverse(nonlinear, two)
    sets = {"data": real, "linear": sdegen.sample(keys[4], one, real.shape).x}
    sets["nonlinear"] = sdegen.simulate(keys[4], back, noise, grid=500).x
    distances = {k: metrics.w2(v, real) for k, v in (sets | {"data": other}).items()}
    print("W2:", {k: round(v, 3) for k, v in distances.items()}, "(data: the floor)")
    print("picture:", pictures.point_clouds(config.out / "samples.png", sets))

if __name__ == "__main__":
    cli.run(main, Config)
