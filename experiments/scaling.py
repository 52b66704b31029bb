"""What a training step sends between devices, and what that costs on a pod: predicted.

    python experiments/scaling.py

A step of a small transformer is compiled for 64 and 256 simulated devices, and what a
device sends is read off the program, beside what the parameters' shapes say. For an
array of X bytes each of n devices in a ring sends

    all-reduce 2 (n - 1)/n X,   all-gather and reduce-scatter (n - 1)/n X.  (1)

Shapes and the makers' figures then give the share of computation in a step of larger
networks. Nothing was measured on a pod; docs/scaling.md. Five minutes on two cores.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh

import sdegen
from sdegen import cli, nets
from sdegen.mesh import make_mesh, parameter_sharding
from sdegen.runs import table
from sdegen.training import Feed, make_call

# bfloat16 operations per second; devices of a group; bytes per second that each sends
# within the group, and beyond. Google Cloud, "TPU v5p": 459 TFLOP/s, 4,800 Gbit/s per
# chip. NVIDIA, "H100 SXM": 989 TFLOP/s, NVLink 900 GB/s, half of it each way;
# "ConnectX-7": 400 Gbit/s, one for each GPU.
MACHINES = {"v5p": (459e12, 10**9, 600e9, 600e9), "H100": (989e12, 8, 450e9, 50e9)}
UTILISATION = 0.4  # assumed, of the peak, without communication
NETWORKS = {
    "DiT-B/2": (nets.DiTConfig("B"), (32, 32, 4), 1000),
    "DiT-XL/2": (nets.DiTConfig("XL"), (32, 32, 4), 1000),
    "DDPM++": (nets.DDPMppConfig(), (32, 32, 3), 0),
}
KINDS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}  # factors of (1)


@dataclasses.dataclass(frozen=True)
class Config:
    step_of: str = ""
    """Only compile a step for this mesh of all devices; what it sends, as JSON."""
    quick: bool = False
    """Few devices and one network."""


def layouts(n):
    """Sizes of the axes "data" and "fsdp"."""
    return (n, 1), (1, n), (n // 8, 8)


def split(network, layout):
    """Bytes of the parameters that are split over "fsdp", and of those that are not."""
    shardings = parameter_sharding(network, AbstractMesh(layout, ("data", "fsdp")))
    sums, pairs = [0, 0], zip(*map(jax.tree.leaves, (network, shardings)), strict=True)
    for leaf, sharding in pairs:
        sums[sharding.is_fully_replicated] += 4 * math.prod(leaf.shape)
    return sums


def collectives(parts, whole, data, fsdp):
    """(kind, bytes, size of the ring, distance of neighbours in it) of one step."""
    yield "all-gather", 2 * parts, fsdp, 1  # forward, and again for backward
    yield "reduce-scatter", parts, fsdp, 1
    yield "all-reduce", parts / fsdp, data, fsdp
    yield "all-reduce", whole, data * fsdp, 1


def sent(kind, size, ring):
    """Equation (1)."""
    return KINDS[kind] * size * (ring - 1) / ring


def read(text):
    """What one device sends, by kind, in a compiled program of one step."""
    found = dict.fromkeys(KINDS, 0.0)
    pattern = r" = (.*?) ([a-z\-]+?)(?:-start)?\(.*replica_groups=(.*)"
    for arrays, kind, groups in re.findall(pattern, text):
        if kind not in KINDS:
            continue
        shapes = re.findall(r"f32\[([0-9,]*)\]", arrays)
        size = 4 * sum(math.prod(map(int, filter(None, s.split(",")))) for s in shapes)
        # {{0,1,2},{3,4,5}}, [2,3]<=[6] or mesh['a'=2,'b'=3] {'b'}
        ring = groups.split("}")[0].count(",") + 1
        if axes := re.match(r"mesh\[(.*?)\] \{(.*?)\}", groups):
            sizes = dict(word.split("=") for word in axes[1].split(","))
            ring = math.prod(int(sizes[name]) for name in axes[2].split(","))
        elif iota := re.match(r"\[[0-9]+,([0-9]+)\]", groups):
            ring = int(iota[1])
        size *= ring if kind == "reduce-scatter" else 1  # what goes in
        found[kind] += sent(kind, size, ring)
    return found


def compile_step(spec):
    mesh, shape = make_mesh(spec), (8, 8, 4)
    config = nets.DiTConfig(width=64, depth=2, heads=2)
    network = config(shape, jax.random.key(0), mesh=mesh)
    data = np.zeros((mesh.size, *shape), np.float32)
    feed = Feed(data, None, batch_size=mesh.size, seed=0, mesh=mesh)
    model = sdegen.Denoiser(network, sdegen.RectifiedFlow())
    call, leaves, _ = make_call(model, feed, steps=1)
    with feed.chunks(0, iter([1])) as chunks:
        text = call.lower(leaves, next(chunks)).compile().as_text()
    return read(text), split(network, tuple(mesh.shape.values()))


def compiled(layout):
    """A row of the first table, by a process of as many devices."""
    spec = "data:{},fsdp:{}".format(*layout)
    flag = f"--xla_force_host_platform_device_count={math.prod(layout)}"
    environment = {"XLA_FLAGS": flag, "NPROC": "32", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--step-of", spec]
    text = subprocess.check_output(command, env=os.environ | environment)
    found, (parts, whole) = json.loads(text.splitlines()[-1])
    formula = dict.fromkeys(KINDS, 0.0)
    for kind, size, ring, _ in collectives(parts, whole, *layout):
        formula[kind] += sent(kind, size, ring)
    row = {"mesh": spec, "whole": f"{whole / (parts + whole):.0%}"}
    return row | {k: f"{found[k] / 1e3:.1f} ({formula[k] / 1e3:.1f})" for k in KINDS}


def seconds(parts, whole, layout, machine):
    """Of communication: within groups, then between them."""
    (_, near, fast, slow), total = machine, 0.0
    for kind, size, ring, distance in collectives(parts, whole, *layout):
        inside = max(1, min(ring, near // distance))
        total += sent(kind, size, inside) / fast
        total += sent(kind, size / inside, ring // inside) / slow
    return total


def predicted(name, devices):
    """Rows of the second table."""
    recipe, shape, classes = NETWORKS[name]
    make = lambda key: recipe.make(shape, cond_dim=classes, rngs=nnx.Rngs(key))  # noqa: E731
    network = jax.eval_shape(make, jax.random.key(0))
    shapes = [(1,), (1, *shape)] + [(1, classes)] * bool(classes)
    given = [jax.ShapeDtypeStruct(s, np.float32) for s in shapes]
    forward = jax.jit(lambda f, *a: f(*a)).lower(network, *given).cost_analysis()
    for layout in [layout for n in devices for layout in layouts(n)]:
        parts, whole = split(network, layout)
        row = {"network": name, "mesh": "data:{},fsdp:{}".format(*layout)}
        row["whole"] = f"{whole / (parts + whole):.0%}"
        for label, machine in MACHINES.items():
            send = seconds(parts, whole, layout, machine)
            row[f"{label}, ms"] = f"{1e3 * send:.2f}"
            for batch in (4, 32):  # forward, and twice as much backward
                work = 3 * batch * forward["flops"] / UTILISATION / machine[0]
                low, high = work / (work + send), work / max(work, send)
                row[f"{label}, {batch}"] = f"{low:.0%} to {high:.0%}"
        yield row


def main(config: Config) -> None:
    if config.step_of:
        return print(json.dumps(compile_step(config.step_of)))
    small = [(2, 4)] if config.quick else [*layouts(64), *layouts(256)]
    rows = [compiled(layout) for layout in small]
    print(f"kB that one device sends in a step (by equation 1)\n{table(rows)}\n")
    names = ["DiT-B/2"] if config.quick else NETWORKS
    rows = [row for name in names for row in predicted(name, (64, 256, 1024))]
    print(f"milliseconds of communication, share of computation\n{table(rows)}")


if __name__ == "__main__":
    cli.run(main, Config)
