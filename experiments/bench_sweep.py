"""What it gains to run trials side by side as one program.

    python experiments/bench_sweep.py
    python experiments/bench_sweep.py --steps 4000

Sixteen trials of a 2-D flow (learning rates and seeds), in three ways, interleaved:

- processes: one process per trial, one after the other, as sweeps are usually run
  (`--timed` of them are run, and their mean stands for the others);
- one program: a process with `sweep`, its trials split over `--devices` CPU devices;
- in one process, without start and compilation: the steps of the program against those
  of `fit`'s compiled loop, trial after trial.

Expect, on two CPU cores, a ratio of 12 for the first two at 400 steps and of 6.5 at
4,000, and of 3 per trial-step. An accelerator is used if it is there.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdegen import cli


@dataclass(frozen=True)
class Config:
    steps: int = 400
    """Training steps of a trial."""
    width: int = 64
    """Features of the network, two residual blocks."""
    batch_size: int = 64
    """Points per step."""
    trials: int = 16
    """Trials of the sweep."""
    timed: int = 3
    """Single processes that are really run, and rounds of all."""
    devices: int = 8
    """Simulated devices of a CPU."""
    seed: int = 0
    """Of the first trial."""
    quick: bool = False
    """A run of seconds that only shows that everything works."""


def trial(key, rate, config):
    """A small flow."""
    import sdegen
    from sdegen import nets, prediction
    from sdegen.sweeps import Training

    data = np.random.default_rng(0).normal(size=(4096, 2)).astype(np.float32)
    network = nets.MLPConfig(width=config.width, depth=2)((2,), key)
    model = sdegen.Denoiser(network, sdegen.RectifiedFlow(), prediction.velocity)
    return Training(
        model,
        data,
        steps=config.steps,
        batch_size=config.batch_size,
        optimizer=sdegen.AdamW(learning_rate=rate),
    )


def space(config):
    rates = np.geomspace(1e-4, 1e-2, max(config.trials // 2, 1))
    return {"rate": list(rates), "seed": range(2)}


def alone(config, number):
    """One trial, from start to end, as a process of its own does it."""
    import jax

    rate = space(config)["rate"][number % 2]
    trial(jax.random.key(number), rate, config).fit(seed=number, progress=False)


def together(config):
    """All trials as one program, as one process does it."""
    import functools

    import jax

    from sdegen import mesh
    from sdegen.sweeps import sweep

    devices = mesh.make_mesh("trial") if jax.device_count() > 1 else None
    bound = functools.partial(trial, config=config)
    sweep(bound, space(config), mesh=devices, progress=False)


def steps(config):
    """Trial-steps per second of the program, and of single runs, compiled before."""
    import functools

    import jax

    from sdegen import mesh
    from sdegen.sweeps.program import Program
    from sdegen.sweeps.space import Space
    from sdegen.sweeps.trial import bind
    from sdegen.training import make_call

    points = Space(space(config)).grid()
    devices = mesh.make_mesh("trial") if jax.device_count() > 1 else None
    program = Program(bind(functools.partial(trial, config=config), None, {}), points)
    program = Program(program.trial, points, devices)
    state, count = program.begin(), 50
    spec = trial(jax.random.key(0), 1e-3, config)
    feed = spec.feed()
    call, leaves, _ = make_call(
        spec.model, feed, steps=config.steps, optimizer=spec.config.optimizer
    )
    calls, ratios, rates = (1 if config.quick else 4), [], []
    for round_ in range(2 if config.quick else 2 * config.timed + 1):
        began = time.perf_counter()
        for k in range(calls):
            state, metrics = program.advance(state, k * count, count)
        jax.block_until_ready((state, metrics))
        many = len(points) * calls * count / (time.perf_counter() - began)
        began = time.perf_counter()
        singles = calls * min(len(points), 4)
        with feed.chunks(0, [count] * singles) as chunks:
            for fed in chunks:
                leaves, metrics = call(leaves, fed)
        jax.block_until_ready((leaves, metrics))
        one = singles * count / (time.perf_counter() - began)
        if round_:  # the first one compiles
            ratios.append(many / one)
            rates.append((many, one))
    many, one = np.median(rates, 0)
    return {"ratio": float(np.median(ratios)), "program": many, "single": one}


def timed(what, config, number=0, devices=1):
    """Wall seconds of a process that does `what`, and what it prints."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "BENCH_SWEEP": what}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    options = {"steps": config.steps, "width": config.width, "seed": number}
    options |= {"batch-size": config.batch_size, "trials": config.trials}
    options |= {"timed": config.timed}
    command = [sys.executable, str(Path(__file__).resolve())]
    command += [word for k, v in options.items() for word in (f"--{k}", str(v))]
    command += ["--quick"] if config.quick else []
    began = time.perf_counter()
    how = {"env": environment, "check": True, "capture_output": True, "text": True}
    done = subprocess.run(command, **how)
    return time.perf_counter() - began, done.stdout


def main(config: Config) -> None:
    config = cli.shrink(config, steps=100, trials=4, timed=1, devices=2)
    what = os.environ.get("BENCH_SWEEP")
    if what == "alone":
        return alone(config, config.seed)
    if what == "together":
        return together(config)
    if what == "steps":
        return print(json.dumps(steps(config)))
    ratios, singles, programs = [], [], []
    for number in range(config.timed):
        singles.append(timed("alone", config, number)[0])
        programs.append(timed("together", config, devices=config.devices)[0])
        ratios.append(config.trials * singles[-1] / programs[-1])
    print(
        f"{config.trials} trials of {config.steps} steps: {config.trials} processes "
        f"{config.trials * np.mean(singles):.1f} s, one program "
        f"{np.mean(programs):.1f} s: ratio {np.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )
    found = json.loads(timed("steps", config, devices=config.devices)[1])
    print(
        f"compiled, {config.devices} devices: {found['program']:,.0f} trial-steps/s "
        f"side by side, {found['single']:,.0f} one by one: ratio {found['ratio']:.2f}"
    )


if __name__ == "__main__":
    cli.run(main, Config)
