"""The cost of the training loop over a bare hand-written scan: a ratio, from one run.

    python experiments/bench_train.py
    python experiments/bench_train.py network:unet --batch-size 64 --steps-per-call 3

Both train the same MLP on the same batches (rectified flow, velocity, AdamW with
clipping and EMA), many steps to a compiled call, in turn in one process; the ratio is
of process CPU time, round by round. The hand-written loop has no notion of processes,
predictions, weights or non-finite steps. Expect a median of at most 1.03.
"""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sdegen
from sdegen import cli, nets, prediction
from sdegen.data import batch_indices, ring
from sdegen.runs import table
from sdegen.training import Feed, make_call


@dataclass(frozen=True)
class Config:
    network: nets.MLPConfig | nets.UNetConfig = nets.MLPConfig(width=128, depth=3)
    """The network of both: a perceptron on points, or a UNet on images 32 x 32 x 1."""
    batch_size: int = 256
    """Points per step."""
    steps_per_call: int = 200
    """Steps in one compiled call, of both."""
    rounds: int = 15
    """Calls of each, in turn."""
    quick: bool = False
    """A run of seconds that only shows that everything works."""


def hand_written(network, data, config):
    """A scan as one would write it for this one model and nothing else."""
    adam = optax.adamw(1e-3, weight_decay=1e-2)
    transform = optax.chain(optax.clip_by_global_norm(1.0), adam)
    leaves, structure = jax.tree.flatten(network)
    state = (leaves, leaves, transform.init(leaves), jnp.zeros((), jnp.int32))
    key = jax.random.key(0)

    def loss(leaves, x0, key):
        t_key, z_key = jax.random.split(key)
        t = (jax.random.uniform(t_key) + jnp.arange(len(x0))) / len(x0)
        t = 1e-3 + (1 - 1e-3) * t
        z = jax.random.normal(z_key, x0.shape)
        time = (jnp.log(t) - jnp.log(jnp.maximum(1 - t, 1e-3 * t))) / 4
        t = t.reshape(-1, *[1] * (x0.ndim - 1))
        x = (1 - t) * x0 + t * z
        scale = 1 / jnp.sqrt(t**2 + (1 - t) ** 2 * 1.4**2)
        network = jax.tree.unflatten(structure, leaves)
        out = network(time, scale * x, None)
        return jnp.mean((out - (z - x0)) ** 2)

    def body(state, rows):
        leaves, ema, opt, step = state
        own = jax.random.fold_in(key, step)
        value, grads = jax.value_and_grad(loss)(leaves, data[rows], own)
        updates, opt = transform.update(grads, opt, leaves)
        leaves = optax.apply_updates(leaves, updates)
        decay = jnp.minimum(0.999, (1 + step) / (10 + step))
        ema = jax.tree.map(lambda a, b: a + (1 - decay) * (b - a), ema, leaves)
        return (leaves, ema, opt, step + 1), value

    call = jax.jit(lambda s, index: jax.lax.scan(body, s, index), donate_argnums=0)
    return call, jax.tree.map(jnp.copy, state)


def main(config: Config) -> None:
    config = cli.shrink(config, steps_per_call=5, rounds=3)
    images = isinstance(config.network, nets.UNetConfig)
    shape, key = (32, 32, 1) if images else (2,), jax.random.key(0)
    points = jax.random.normal(key, (512, *shape))
    data = points if images else ring().sample(key, 10_000)
    network, path = config.network(shape, jax.random.key(1)), sdegen.RectifiedFlow()
    denoiser = sdegen.Denoiser(network, path, prediction.velocity, sigma_data=1.4)
    optimizer = sdegen.AdamW(warmup=0, decay=False)
    feed = Feed(data, None, batch_size=config.batch_size, seed=0, mesh=None)
    ours, our_state, _ = make_call(denoiser, feed, steps=10**6, optimizer=optimizer)
    hand, hand_state = hand_written(network, data, config)

    def index(call):
        steps, sizes = config.steps_per_call, {"n": len(data)}
        sizes["batch_size"] = config.batch_size
        return jnp.asarray(batch_indices(0, call * steps, steps, **sizes))

    ratios, costs = [], []
    for call in range(config.rounds + 1):  # the first compiles
        rows = index(call)
        spent = {}
        for name in ("ours", "hand") if call % 2 else ("hand", "ours"):
            began = time.process_time()
            if name == "ours":
                our_state, metrics = ours(our_state, rows)
                jax.block_until_ready(metrics)
            else:
                hand_state, values = hand(hand_state, rows)
                values.block_until_ready()
            spent[name] = time.process_time() - began
        if call:
            ratios.append(spent["ours"] / spent["hand"])
            costs.append((spent["ours"], spent["hand"]))
    costs = np.median(costs, axis=0) / config.steps_per_call
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    row = {"network": type(network).__name__, "batch": config.batch_size}
    row |= {"ours, CPU us/step": 1e6 * costs[0], "hand": 1e6 * costs[1]}
    row |= {"ratio": median, "quartiles": f"{low:.3f} to {high:.3f}"}
    print(table([row]))


if __name__ == "__main__":
    cli.run(main, Config)
