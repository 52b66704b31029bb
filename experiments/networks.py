"""What the networks cost: parameters, FLOPs of one forward pass, and small step times.

    python experiments/networks.py

Parameters and FLOPs come from the traced program, nothing large is made: minutes on one
CPU core. FLOPs are those of XLA's cost analysis of the lowered program for one image,
two for each multiplication with its addition. The times are of one training step, loss
and gradient, of a batch on this machine's CPU, for the networks small enough to wait
for; nothing here is measured on an accelerator.
"""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from sdegen import cli, nets
from sdegen.runs import table

WIDER = (1, 2, 2, 2)  # multiples for 64 x 64
NETWORKS = {
    "UNet, 24 channels": (nets.UNetConfig(channels=24), (8, 8, 1), 0),
    "DiT, 128 x 4": (nets.DiTConfig(width=128, depth=4, heads=4), (8, 8, 1), 0),
    "DiT-S/8": (nets.DiTConfig("S", patch=8), (32, 32, 4), 1000),
    "DDPM++": (nets.DDPMppConfig(), (32, 32, 3), 0),
    "NCSN++": (nets.NCSNppConfig(), (32, 32, 3), 0),
    "DDPM++, 64": (nets.DDPMppConfig(multiples=WIDER), (64, 64, 3), 0),
    "NCSN++, 64": (nets.NCSNppConfig(multiples=WIDER), (64, 64, 3), 0),
    "ADM": (nets.ADMConfig(), (64, 64, 3), 1000),
}
NETWORKS |= {
    f"EDM2-{size}": (nets.EDM2Config(size), (64, 64, 4), 1000)
    for size in ("XS", "S", "M", "L", "XL", "XXL")
}
NETWORKS |= {
    f"DiT-{size}/{patch}": (nets.DiTConfig(size, patch=patch), (32, 32, 4), 1000)
    for size, patch in (("S", 2), ("B", 2), ("L", 2), ("XL", 4), ("XL", 2))
}


@dataclass(frozen=True)
class Config:
    largest: float = 1.0
    """GFLOPs of one image up to which a step is timed."""
    batch_size: int = 16
    """Images in a step."""
    rounds: int = 5
    """Steps that are timed; the median counts."""
    quick: bool = False
    """A run of seconds that only shows that everything works."""


def traced(recipe, shape, cond_dim):
    """Parameters and GFLOPs of one image, without making the network."""

    def make(key):
        return recipe.make(shape, cond_dim=cond_dim, rngs=nnx.Rngs(key))

    network = jax.eval_shape(make, jax.random.key(0))
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    cond = floats(1, cond_dim) if cond_dim else None
    call = jax.jit(lambda network, t, x, cond: network(t, x, cond))
    cost = call.lower(network, floats(1), floats(1, *shape), cond).cost_analysis()
    return sum(p.size for p in jax.tree.leaves(network)), cost["flops"] / 1e9


def seconds(recipe, shape, cond_dim, config):
    """The median time of a loss with its gradient."""
    network = recipe(shape, jax.random.key(0), cond_dim=cond_dim)
    x, t = jnp.ones((config.batch_size, *shape)), jnp.zeros(config.batch_size)
    cond = jnp.zeros((config.batch_size, cond_dim)) if cond_dim else None
    step = jax.jit(jax.grad(lambda network: jnp.mean((network(t, x, cond) - x) ** 2)))
    spent = []
    for _ in range(config.rounds + 1):  # the first compiles
        began = time.perf_counter()
        jax.block_until_ready(step(network))
        spent.append(time.perf_counter() - began)
    return sorted(spent[1:])[config.rounds // 2]


def main(config: Config) -> None:
    config = cli.shrink(config, largest=0.02, batch_size=2, rounds=1)
    rows = []
    for name, case in list(NETWORKS.items())[: 3 if config.quick else None]:
        size, flops = traced(*case)
        image = " x ".join(map(str, case[1]))
        row = {"network": name, "image": image, "parameters": f"{size:,}"}
        row |= {"GFLOPs": f"{flops:,.3g}" if flops < 1e3 else f"{flops:,.0f}"}
        row["CPU ms a step"] = "not measured"
        if flops <= config.largest:
            row["CPU ms a step"] = f"{1e3 * seconds(*case, config):.0f}"
        rows.append(row)
    print(table(rows))


if __name__ == "__main__":
    cli.run(main, Config)
