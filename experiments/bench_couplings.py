"""Training steps of flow matching per CPU-second, against torchcfm, from one run.

    python experiments/bench_couplings.py

Both train three hidden layers of 64 on batches of 256 points of the plane, eight
Gaussians to moons, on one thread, in turn in one process. torchcfm (`pip install torch
torchcfm`) runs its matchers, network and Adam as its examples do: `step`, with batches
that are there; `tutorial`, which draws every batch; `exact`, with an exact plan of the
256 points. sdegen runs what `fit` runs (the batch from 100,000 points, AdamW with
clipping, an average), for `exact` with plans of 64 points (and, `exact, whole`, of
256). The quality is that of experiments/two_dim.py, which has this network.

Expect ratios of about 5, 18, 4 and 1: the last is the matching itself. On an
accelerator the unit is steps per second.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("NPROC", "1")  # before JAX starts: one thread, as PyTorch's
sys.path.insert(0, str(Path(__file__).parent))

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from two_dim import Plain  # noqa: E402

import sdegen  # noqa: E402
from sdegen import cli, coupling, data
from sdegen.runs import table
from sdegen.training import Feed, make_call


@dataclass(frozen=True)
class Config:
    width: int = 64
    """Features of the three hidden layers."""
    batch_size: int = 256
    """Points per step."""
    steps: int = 200
    """Steps of sdegen in one turn; torchcfm takes a tenth."""
    rounds: int = 7
    """Turns of each."""
    quick: bool = False
    """A run of seconds that only shows that everything works."""


def ours(config, plan):
    """A function that runs `config.steps` steps."""
    sets = data.moons(), data.eight_gaussians()
    drawn = (each.sample(jax.random.key(0), 100_000) for each in sets)
    x0, x1 = (np.asarray(x, np.float32) for x in drawn)
    network = Plain(config.width, x0.std(), rngs=nnx.Rngs(0))
    noise = sdegen.Empirical(x1)
    interpolant = sdegen.StochasticInterpolant(latent=None, noise=noise)
    loss = eqx.Partial(sdegen.velocity_loss, coupling=plan)
    feed = Feed(x0, None, batch_size=config.batch_size, seed=0, mesh=None)
    model = sdegen.VelocityModel(network, interpolant)
    call, leaves, _ = make_call(model, feed, steps=10**6, loss=loss)
    with feed.chunks(0, iter([config.steps])) as chunks:
        fed = next(chunks)

    def run():
        nonlocal leaves
        leaves, metrics = call(leaves, fed)
        jax.block_until_ready(metrics)

    return run


def theirs(config, torch, kind):
    """A function that runs a tenth of the steps of torchcfm."""
    from torchcfm import conditional_flow_matching as cfm
    from torchcfm.models.models import MLP
    from torchcfm.utils import sample_8gaussians, sample_moons

    matcher = cfm.ConditionalFlowMatcher(sigma=0.1)
    if kind == "exact":
        matcher = cfm.ExactOptimalTransportConditionalFlowMatcher(sigma=0.1)
    network = MLP(dim=2, w=config.width, time_varying=True)
    optimizer = torch.optim.Adam(network.parameters())

    def draw():
        return sample_8gaussians(config.batch_size), sample_moons(config.batch_size)

    there = draw()

    def run():
        for _ in range(max(config.steps // 10, 1)):
            optimizer.zero_grad()
            x0, x1 = draw() if kind == "tutorial" else there
            t, x, u = matcher.sample_location_and_conditional_flow(x0, x1)
            v = network(torch.cat([x, t[:, None]], dim=-1))
            torch.mean((v - u) ** 2).backward()
            optimizer.step()

    return run


def main(config: Config) -> None:
    config = cli.shrink(config, steps=10, rounds=1)
    cpu = jax.default_backend() == "cpu"
    clock = time.process_time if cpu else time.perf_counter
    independent = ours(config, coupling.independent)
    runs = {
        "step": ("step", independent),
        "tutorial": ("tutorial", independent),
        "exact": ("exact", ours(config, coupling.ExactOT())),
        "exact, whole": ("exact", ours(config, coupling.ExactOT(points=None))),
    }
    try:
        import torch
        import torchcfm  # noqa: F401

        torch.set_num_threads(1)
        others = {kind: theirs(config, torch, kind) for kind, _ in runs.values()}
    except ImportError as error:
        print(f"{error}: nothing to compare with (pip install torch torchcfm).")
        others = {}
    rows = []
    for name, (kind, own) in runs.items():
        pair = [(own, config.steps)]
        if kind in others:
            pair.append((others[kind], max(config.steps // 10, 1)))
        for run, _ in pair:
            run()  # compiles
        rates = np.zeros((config.rounds, len(pair)))
        for turn in range(config.rounds):
            for i in range(len(pair)) if turn % 2 else reversed(range(len(pair))):
                began = clock()
                pair[i][0]()
                rates[turn, i] = pair[i][1] / (clock() - began)
        row = {"steps per CPU-second" if cpu else "steps per second": name}
        row["sdegen"] = float(np.median(rates[:, 0]))
        if len(pair) == 2:
            row["torchcfm"] = float(np.median(rates[:, 1]))
            row["ratio"] = float(np.median(rates[:, 0] / rates[:, 1]))
        rows.append(row)
    print(table(rows))


if __name__ == "__main__":
    cli.run(main, Config)
