"""Flows in the plane: every coupling, by distance, straightness and cost.

    python experiments/two_dim.py
    python experiments/two_dim.py --tasks gaussian-moons --methods exact entropic

The network, batch and steps are those of the published tables (3 hidden layers of 64,
256 points, 10,000 steps). Velocities under four couplings (`independent`, `exact` in
plans of 64 points, `whole`, one exact plan for the batch, `entropic`) are trained for
all seeds as one vectorised program; `reflow` is the 2-rectified flow of `independent`,
`bridge` the Schroedinger bridge of minibatch plans, and `fitting` that of iterative
Markovian fitting, both with the noise of sigma = 1, in 20 steps.

W2 is the root of the exact squared cost between `--points` generated points and as many
held-out ones, by adaptive steps, 20, 10 and 1 steps of Euler's method; the floor is
that between two real sets. Two random sets differ by the counts of their modes, which
hides all else on eight Gaussians: the second table starts from, and compares with,
stratified sets. NPE is |path energy - W2^2| / W2^2, S the straightness.

Expect, in some three minutes of CPU time for each task and coupling, and up to ten for
those of several rounds, W2 at the floor of random sets by adaptive steps, from Gaussian
to moons .20 in 20 steps and .38 in one with exact plans, where independent pairs give
.29 and 2.9, and .23 in one step after reflow. With POT (`pip install 'sdegen[ot]'`)
distances are quicker. Pictures: paths.png in --out; the rows of both tables, with
standard errors, in rows.jsonl.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import sdegen
from sdegen import cli, coupling, data, metrics
from sdegen.runs import Recorder, plots, table

TASKS = {
    "8gaussians-moons": (data.eight_gaussians(), data.moons()),
    "gaussian-moons": (data.gaussian(), data.moons()),
    "gaussian-checkerboard": (data.gaussian(), data.checkerboard()),
    "gaussian-8gaussians": (data.gaussian(), data.eight_gaussians()),
    "gaussian-s_curve": (data.gaussian(), data.s_curve()),
    "moons-8gaussians": (data.moons(), data.eight_gaussians()),
}
"""From which distribution to which: t = 1 is the first, t = 0 the second."""
COUPLINGS = {
    "independent": coupling.independent,
    "exact": coupling.ExactOT(),
    "whole": coupling.ExactOT(points=None),
    "entropic": coupling.EntropicOT(points=64),
}
ROUNDS = ("reflow", "bridge", "fitting")
TRAINED = 100_000  # points of each distribution that training draws from


@dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = tuple(TASKS)
    """Which pairs of distributions."""
    methods: tuple[str, ...] = (*COUPLINGS, *ROUNDS)
    """Which couplings, and which methods of several rounds."""
    optimizer: sdegen.AdamW | sdegen.Lion = field(
        default_factory=lambda: sdegen.AdamW(learning_rate=5e-3, weight_decay=0.0)
    )
    """How every network learns."""
    width: int = 64
    """Features of the three hidden layers."""
    steps: int = 10_000
    """Training steps (of each round)."""
    batch_size: int = 256
    """Points per step."""
    points: int = 2048
    """Points per set when distances are measured."""
    seeds: int = 5
    """Networks, trained and sampled with keys of their own."""
    rounds: int = 4
    """Rounds of Markovian fitting, each of half the steps."""
    quick: bool = False
    """A run of seconds that only shows that everything works."""
    out: Path = Path("runs/two_dim")
    """Directory for config.json, rows.jsonl and the picture."""


class Plain(nnx.Module):
    """(t, x) -> 3 hidden layers -> an array of the shape of x."""

    def __init__(self, width, scale, *, rngs):
        sizes = [3, width, width, width, 2]
        layers = zip(sizes, sizes[1:], strict=False)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in layers])
        self.scale = float(scale)

    def __call__(self, t, x, cond=None):
        h = jnp.concatenate([x / self.scale, 2 * t[:, None] - 1], axis=1)
        for layer in self.layers[:-1]:
            h = jax.nn.silu(layer(h))
        return self.scale * self.layers[-1](h)


def distance(x, y):
    """W2, by POT where it is installed: quicker by far where all points are one."""
    if importlib.util.find_spec("ot") is None:
        return metrics.w2(x, y)
    return metrics.transport(x, y).distance


def distributions(name):
    """(source, target, training points of the target, the source as noise)."""
    source, target = TASKS[name]
    key = jax.random.key(10**6)
    rows = np.asarray(target.sample(key, TRAINED))
    noise = sdegen.Gaussian()
    if not name.startswith("gaussian"):
        noise = sdegen.Empirical(source.sample(jax.random.fold_in(key, 1), TRAINED))
    return source, target, rows, noise


def solves(key, model, config, source):
    """What is measured of one model, on the device: samples of every kind."""
    bridge = isinstance(model, sdegen.SchroedingerBridge)
    noise = {"stochasticity": 1.0} if bridge else {"solver": diffrax.Euler()}
    n, pick = config.points, jax.random.fold_in(key, 7)
    start = jnp.concatenate([source.sample(pick, n, even) for even in (False, True)])
    given, points = {"start": start, "shape": start.shape}, {}
    for steps in (1, 10, 20):
        points[str(steps)] = sdegen.sample(key, model, grid=steps, **noise, **given).x
    if not bridge:
        best = sdegen.Adaptive(1e-4, 1e-4)
        points["best"] = sdegen.sample(key, model, grid=best, **given).x
    ways = sdegen.sample(
        key, model, grid=50, trajectory=True, **(noise if bridge else {}), **given
    )
    return {
        "random": jax.tree.map(lambda x: x[:n], points),
        "stratified": jax.tree.map(lambda x: x[n:], points),
        "frames": ways.trajectory[:, n:],
        "times": ways.times,
    }


def measured(task, config, known, smooth=True):
    """The host's part: a function from what `solves` gives to metrics."""
    source, target = TASKS[task]

    def real(kind, number):
        key = jax.random.key(2 * 10**6 + number)
        even = kind == "stratified"
        return np.asarray(target.sample(key, config.points, even))

    def floor(kind):
        if (task, kind) not in known:
            sets = [real(kind, i) for i in range(6)]
            known[task, kind] = np.mean(
                [distance(a, b) for a, b in zip(sets[::2], sets[1::2], strict=True)]
            )
        return float(known[task, kind])

    def least():
        """W2^2 from source to target, which no path energy is below."""
        if (task, "least") not in known:
            start = source.sample(jax.random.key(3), config.points, True)
            known[task, "least"] = distance(start, real("stratified", 0)) ** 2
        return known[task, "least"]

    def measure(raw):
        frames, times, row = raw["frames"], raw["times"], {}
        for kind in ("random", "stratified"):
            for name, x in raw[kind].items():
                if kind == "stratified" and name in ("10", "20"):
                    continue
                row[f"{kind} {name}"] = distance(np.asarray(x), real(kind, 0))
        if smooth:
            energy = metrics.path_energy(frames, times, w2_squared=least())
            gaps = np.asarray(frames[-1]) - np.asarray(frames[0])
            row["NPE"] = energy.normalised
            row["S"] = metrics.straightness(frames, times)
            row["cost"] = float((gaps**2).sum(1).mean())
        return row | {f"{k} floor": floor(k) for k in ("random", "stratified")}

    return measure


def couplings(task, method, config, known, drawn):
    """Rows of the seeds of one coupling, trained as one program."""
    source, _, rows, noise = distributions(task)
    interpolant = sdegen.StochasticInterpolant(latent=None, noise=noise)
    loss = eqx.Partial(sdegen.velocity_loss, coupling=COUPLINGS[method])
    measure = measured(task, config, known)

    def trial(key):
        network = Plain(config.width, rows.std(), rngs=nnx.Rngs(key))
        return sdegen.Training(
            sdegen.VelocityModel(network, interpolant),
            rows,
            steps=config.steps,
            batch_size=config.batch_size,
            optimizer=config.optimizer,
            loss=loss,
            steps_per_call=min(500, config.steps),
            evaluate=lambda key, model: solves(key, model, config, source),
            measure=judge,
        )

    def judge(raw):
        drawn.setdefault((task, method), np.asarray(raw["frames"]))
        return measure(raw)

    result = sdegen.sweep(trial, {"seed": range(config.seeds)}, progress=False)
    names = ("seed", "trial", "status", "step", "loss")
    return [{k: v for k, v in r.items() if k not in names} for r in result.rows]


def rounds(task, method, config, known, drawn):
    """Rows of the seeds of a method that trains more than once."""
    source, _, x0, noise = distributions(task)
    measure = measured(task, config, known, smooth=method == "reflow")
    judge = jax.jit(lambda key, model: solves(key, model, config, source))
    n = min(20_000, TRAINED) if not config.quick else 512
    found = []
    for seed in range(config.seeds):
        key = jax.random.key(seed)
        keys = jax.random.split(key)
        nets = [Plain(config.width, x0.std(), rngs=nnx.Rngs(k)) for k in keys]
        number, pairs, options = 2, {"grid": 20}, {}
        if method == "reflow":
            interpolant = sdegen.StochasticInterpolant(latent=None, noise=noise)
            model = sdegen.VelocityModel(nets[0], interpolant)
        else:
            model = sdegen.SchroedingerBridge(*nets, 1.0, noise)
            pairs["stochasticity"], options["both_ways"] = 1.0, True
            number = config.rounds
            if method == "bridge":
                plan, number = coupling.EntropicOT(2.0, points=128), 1
                options["loss"] = eqx.Partial(sdegen.bridge_loss, coupling=plan)
        *_, last = sdegen.rectify(
            key,
            model,
            x0[: TRAINED if number == 1 else n],
            rounds=number,
            n=min(n, 4096) if number == 1 else n,
            steps=config.steps // (2 if method == "fitting" else 1),
            batch_size=config.batch_size,
            optimizer=config.optimizer,
            steps_per_call=min(500, config.steps),
            seed=seed,
            progress=False,
            pairs=pairs,
            **options,
        )
        raw = jax.device_get(judge(key, last.model))
        drawn.setdefault((task, method), raw["frames"])
        found.append(measure(raw))
    return found


def line(task, method, rows):
    """Means and standard errors over the seeds."""
    out = {"task": task, "method": method}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
        out[name] = float(values.mean())
        out[f"{name} se"] = float(error)
    return out


def show(lines, kind, columns):
    """One of the two tables."""

    def cell(row, name):
        if name not in row:
            return "-"
        if name.endswith("floor"):
            return f"{row[name]:.3f}"
        return f"{row[name]:.3f} +- {row[f'{name} se']:.3f}"

    shown = []
    for row in lines:
        cells = {c: cell(row, n) for c, n in columns.items()}
        shown.append({"task": row["task"], "method": row["method"]} | cells)
    print(f"\n{kind}\n{table(shown)}")


def main(config: Config):
    if config.quick:
        config = dataclasses.replace(
            config,
            tasks=config.tasks[:1],
            methods=("exact", "fitting"),
            steps=20,
            points=64,
            seeds=2,
            rounds=2,
        )
    known, drawn, lines = {}, {}, []
    with Recorder(config.out, config) as recorder:
        for task in config.tasks:
            for method in config.methods:
                run: Callable = couplings if method in COUPLINGS else rounds
                lines.append(
                    line(task, method, run(task, method, config, known, drawn))
                )
                recorder.row(**lines[-1])
                print(f"{task}, {method}: W2 {lines[-1]['random 20']:.3f}", flush=True)
    show(
        lines,
        "W2, random sets: adaptive steps, 20, 10 and 1 Euler steps",
        {"floor": "random floor", "adaptive": "random best"}
        | {str(n): f"random {n}" for n in (20, 10, 1)},
    )
    show(
        lines,
        "W2, stratified sets; path energy, straightness, cost",
        {"floor": "stratified floor", "adaptive": "stratified best"}
        | {"1": "stratified 1", "NPE": "NPE", "S": "S", "cost": "cost"},
    )
    plots.paths(config.out / "paths.png", drawn)
    print(f"\nlook at {config.out}/paths.png")


if __name__ == "__main__":
    cli.run(main, Config)
