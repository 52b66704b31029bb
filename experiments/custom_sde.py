"""Two equations of your own, linear and nonlinear, from data to noise and back.

python experiments/custom_sde.py [--help]: about 2 minutes on two CPU cores. Expect W2 of at
most twice the floor, the same distance between two sets of data. Picture in --out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import sdegen
from sdegen import cli, metrics, nets, pictures
from sdegen.data import ring

linear = sdegen.LinearSDE(  # dx = -k t x dt + sqrt(2 k t) dw
    f=lambda t, k: -k * t, g=lambda t, k: jnp.sqrt(2 * k * t), params=10.0
)
nonlinear = sdegen.CustomSDE(  # dx = (-g^2 x / 2 + g g') dt + g(x) dw
    drift=lambda t, x, p: -0.5 * (1 + p * jnp.sin(x) ** 2) * x + p * jnp.sin(2 * x) / 2,
    diffusion=lambda t, x, p: jnp.sqrt(1 + p * jnp.sin(x) ** 2),
    params=1.0, t_min=0.02, t_max=5.0,
)  # fmt: skip


class Score(eqx.Module):
    network: Any

    def __call__(self, t, x):  # the score of the nonlinear SDE, for one sample
        return self.network(jnp.log(t), x[None], None)[0]


def implicit_loss(score, key, x0, cond, axis_name=None):  # Hyvarinen 2005, all along the SDE
    out = sdegen.simulate(key, nonlinear, x0, grid=jnp.geomspace(0.02, 5.0, 33), trajectory=True)
    t, x = jnp.repeat(out.times, len(x0)), out.trajectory.reshape(-1, x0.shape[1])
    s, jacobian = jax.vmap(score)(t, x), jax.vmap(jax.jacfwd(score, argnums=1))(t, x)
    return jnp.mean(0.5 * jnp.sum(s**2, -1) + jnp.trace(jacobian, axis1=1, axis2=2))


@dataclass(frozen=True)
class Config:
    steps: int = 1500  # of training, for each equation
    quick: bool = False  # a run of seconds that only shows that everything works
    out: Path = Path("runs/custom_sde")  # directory of the picture


def main(config: Config) -> None:
    steps, keys = cli.shrink(config, steps=20).steps, jax.random.split(jax.random.key(0), 6)
    law, net = ring(modes=5, std=0.25), nets.Mlp(width=64, depth=2)((2,), keys[3])
    data, real, other = (law.sample(k, n) for k, n in zip(keys, (20000, 1000, 1000)))
    fit = sdegen.fit(sdegen.Denoiser(net, linear, sigma_data=data.std()), data, steps=steps)
    clouds = {"data": real, "linear": sdegen.sample(keys[4], fit.denoiser, real.shape).x}
    fit = sdegen.fit(Score(net), data, steps=steps, batch_size=64, loss=implicit_loss)
    backward, noise = sdegen.reverse(nonlinear, fit.denoiser), jax.random.normal(keys[5], real.shape)
    clouds["nonlinear"] = sdegen.simulate(keys[4], backward, noise, grid=500).x
    print(f"W2: floor {metrics.w2(other, real):.3f}", end="")
    print(*(f", {k} {metrics.w2(v, real):.3f}" for k, v in clouds.items() if k != "data"))
    print("picture:", pictures.point_clouds(config.out / "samples.png", clouds))


if __name__ == "__main__":
    cli.run(main, Config)
