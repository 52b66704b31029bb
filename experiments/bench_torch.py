"""The same UNet in sdegen and in PyTorch: images per CPU-second, from one run.

    python experiments/bench_torch.py

Both have the same layers and the same number of parameters (checked), compute in
float32 on images 32 x 32 x 1, and take turns in one process. Sampling is one network
evaluation without gradients; training is loss, gradient and an AdamW step, ours with
clipping, average and all that `fit` does, PyTorch's with AdamW alone. PyTorch runs
eagerly, in channels-last memory, its faster layout on a CPU (--compile adds
torch.compile, which needs a C++ compiler). On an accelerator, if both see one, the unit
is images per second. Expect ratios of about .75 and .45 on two quiet CPU cores: XLA's
convolutions are the slow part. On a loaded machine PyTorch's waiting threads count as
CPU time, and the ratios mean nothing.
"""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

import sdegen
from sdegen import cli, nets, prediction
from sdegen.runs import table
from sdegen.training import Feed, make_call


@dataclass(frozen=True)
class Config:
    network: nets.UNetConfig = nets.UNetConfig(32, multiples=(1, 2, 3), blocks=1)
    """The structure of both."""
    batch_size: int = 64
    """Images per call."""
    calls: int = 4
    """Steps or evaluations in one turn."""
    rounds: int = 5
    """Turns of each."""
    compile: bool = False
    """Run PyTorch through torch.compile."""
    quick: bool = False
    """A run of seconds that only shows that everything works."""


def torch_unet(recipe, nn, torch):
    """The UNet of `sdegen.nets.UNet`, layer by layer."""
    width, silu = 4 * recipe.channels, nn.functional.silu

    class Res(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.norm1, self.norm2 = nn.GroupNorm(8, a), nn.GroupNorm(8, b)
            self.conv1 = nn.Conv2d(a, b, 3, padding=1)
            self.conv2 = nn.Conv2d(b, b, 3, padding=1)
            self.emb = nn.Linear(width, 2 * b)
            self.skip = nn.Identity() if a == b else nn.Conv2d(a, b, 1)

        def forward(self, h, emb):
            r = self.conv1(silu(self.norm1(h)))
            scale, shift = self.emb(emb)[..., None, None].chunk(2, 1)
            return self.skip(h) + self.conv2(silu(self.norm2(r) * (1 + scale) + shift))

    class Attention(nn.Module):
        def __init__(self, a):
            super().__init__()
            self.heads, self.norm = max(1, a // 32), nn.LayerNorm(a)
            self.qkv, self.out = nn.Linear(a, 3 * a), nn.Linear(a, a)

        def forward(self, h):
            b, c, y, x = h.shape
            flat = self.norm(h.permute(0, 2, 3, 1).reshape(b, y * x, c))
            qkv = self.qkv(flat).reshape(b, y * x, 3, self.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            a = nn.functional.scaled_dot_product_attention(q, k, v)
            a = self.out(a.transpose(1, 2).reshape(b, y * x, c))
            return h + a.reshape(b, y, x, c).permute(0, 3, 1, 2)

    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = [recipe.channels * m for m in recipe.multiples]
            self.time, self.emb = nn.Linear(33, width), nn.Linear(width, width)
            self.first = nn.Conv2d(1, sizes[0], 3, padding=1)
            down, up, widen, skips, a = [], [], [], [sizes[0]], sizes[0]
            for level, size in enumerate(sizes):
                for _ in range(recipe.blocks):
                    down.append(Res(a, size))
                    a = size
                    skips.append(a)
                if level < len(sizes) - 1:
                    skips.append(a)
            self.middle1, self.middle2, self.attend = Res(a, a), Res(a, a), Attention(a)
            for level in reversed(range(len(sizes))):
                for _ in range(recipe.blocks + 1):
                    up.append(Res(a + skips.pop(), sizes[level]))
                    a = sizes[level]
                if level:
                    widen.append(nn.Conv2d(a, sizes[level - 1], 3, padding=1))
                    a = sizes[level - 1]
            self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
            self.widen = nn.ModuleList(widen)
            self.norm, self.last = nn.LayerNorm(a), nn.Conv2d(a, 1, 3, padding=1)

        def forward(self, t, x):
            phase = t[:, None] * torch.logspace(-3, 2, 16, 2) * 2 * np.pi
            features = torch.cat([phase.sin(), phase.cos(), t[:, None]], 1)
            emb = silu(self.emb(silu(self.time(features))))
            h = self.first(x)
            skips, levels = [h], len(recipe.multiples)
            for level in range(levels):
                for i in range(recipe.blocks):
                    h = self.down[level * recipe.blocks + i](h, emb)
                    skips.append(h)
                if level < levels - 1:
                    h = nn.functional.avg_pool2d(h, 2)
                    skips.append(h)
            h = self.middle2(self.attend(self.middle1(h, emb)), emb)
            for level in range(levels):
                for i in range(recipe.blocks + 1):
                    block = self.up[level * (recipe.blocks + 1) + i]
                    h = block(torch.cat([h, skips.pop()], 1), emb)
                if level < levels - 1:
                    h = self.widen[level](nn.functional.interpolate(h, None, 2))
            h = self.norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.last(silu(h))

    return UNet()


def theirs(config, torch):
    """(evaluate, train, parameters): calls of PyTorch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = torch_unet(config.network, torch.nn, torch)
    net = net.to(device, memory_format=torch.channels_last)
    size = sum(p.numel() for p in net.parameters())
    run = torch.compile(net) if config.compile else net
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-2)
    x = torch.randn(config.batch_size, 1, 32, 32, device=device)
    x = x.to(memory_format=torch.channels_last)
    t = torch.rand(config.batch_size, device=device)

    def evaluate():
        with torch.no_grad():
            for _ in range(config.calls):
                out = run(t, x)
        out.sum().item()

    def train():
        for _ in range(config.calls):
            z = torch.randn_like(x)
            x_t = (1 - t[:, None, None, None]) * x + t[:, None, None, None] * z
            loss = ((run(t, x_t) - (z - x)) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()

    return evaluate, train, size


def ours(config):
    """(evaluate, train, parameters): calls of sdegen."""
    network = config.network((32, 32, 1), jax.random.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(network))
    model = sdegen.Denoiser(network, sdegen.RectifiedFlow(), prediction.velocity, 1.0)
    data = np.random.default_rng(0).normal(size=(256, 32, 32, 1)).astype(np.float32)
    feed = Feed(data, None, batch_size=config.batch_size, seed=0, mesh=None)
    call, leaves, _ = make_call(model, feed, steps=10**6)
    with feed.chunks(0, iter([config.calls])) as chunks:
        fed = next(chunks)
    x = jnp.asarray(data[: config.batch_size])

    @jax.jit
    def apply(network, x):
        return network(jnp.full(len(x), 0.5), x)

    def evaluate():
        for _ in range(config.calls):
            out = apply(network, x)
        out.block_until_ready()

    def train():
        nonlocal leaves
        leaves, metrics = call(leaves, fed)
        jax.block_until_ready(metrics)

    return evaluate, train, size


def main(config: Config) -> None:
    small = nets.UNetConfig(channels=8, multiples=(1, 2))
    config = cli.shrink(config, network=small, batch_size=4, calls=1, rounds=1)
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: nothing to compare with (pip install torch).")
        return
    cpu = jax.default_backend() == "cpu" and not torch.cuda.is_available()
    clock = time.process_time if cpu else time.perf_counter
    evaluate, train, size = ours(config)
    other, other_train, other_size = theirs(config, torch)
    if size != other_size:
        raise ValueError(f"the networks differ: {size} and {other_size} parameters.")
    rows = []
    pairs = {"evaluation": (evaluate, other), "training step": (train, other_train)}
    for what, pair in pairs.items():
        for run in pair:
            run()  # compiles
        seconds = np.zeros((config.rounds, 2))
        for turn in range(config.rounds):
            for i in (0, 1) if turn % 2 else (1, 0):
                began = clock()
                pair[i]()
                seconds[turn, i] = clock() - began
        rates = config.calls * config.batch_size / seconds
        row = {"images per CPU-second" if cpu else "images per second": what}
        row |= {"sdegen": np.median(rates[:, 0]), "PyTorch": np.median(rates[:, 1])}
        rows.append(row | {"ratio": np.median(rates[:, 0] / rates[:, 1])})
    print(f"UNet of {size:,} parameters, 32 x 32 x 1, batch {config.batch_size}")
    print(table(rows))


if __name__ == "__main__":
    cli.run(main, Config)
