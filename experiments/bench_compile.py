"""What a first call costs before it computes: equations, tracing, lowering, compiling.

    python experiments/bench_compile.py
    python experiments/bench_compile.py --cases flow sde --repeats 5

Every case runs in fresh processes, in turn with a hand-written scan of Euler steps over
the same network, and prints its seconds over that scan's. Equations do not depend on
the machine; a test holds them (tests/test_compile.py).
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

import sdegen
from sdegen import cli, nets
from sdegen.runs.recorder import table

BATCH = 256


def make(process):
    network = nets.MLPConfig(width=64, depth=3)((2,), jax.random.key(0))
    return sdegen.Denoiser(network, process)


def linear():
    """VP's equation, as a user would write it."""
    beta = lambda t: 0.1 + 19.9 * t  # noqa: E731
    return sdegen.LinearSDE(
        lambda t, c: -0.5 * c * beta(t), lambda t, c: jnp.sqrt(c * beta(t)), 1.0
    )


def draw(**options):
    key = jax.random.key(1)
    return lambda model: sdegen.sample(key, model, (BATCH, 2), **options).x


def by_hand(model):
    """32 steps of DDIM, with nothing that a hand-written script would not have."""
    path, s = model.path, model.sigma_data

    def step(x, times):
        (a, b), (c, d) = (path.scales(t) for t in times)
        scale = 1 / jnp.sqrt(b**2 + (a * s) ** 2)
        time = jnp.full(BATCH, jnp.log(b / a) / 4)
        out = model.network(time, scale * x, None)
        x0 = a * s**2 * scale**2 * x + s * b * scale * out
        return c * x0 + d * (x - a * x0) / b, None

    ts = jnp.linspace(path.t_max, path.t_min, 33)
    x = jax.random.normal(jax.random.key(1), (BATCH, 2))
    return jax.lax.scan(step, x, (ts[:-1], ts[1:]))[0]


def likelihood(model):
    return sdegen.log_likelihood(model, jnp.zeros((BATCH, 2))).value


CASES = {
    "by hand": (sdegen.VP, by_hand),
    "flow": (sdegen.VP, draw()),
    "DDIM": (sdegen.VP, draw(solver=sdegen.solvers.DDIM())),
    "Heun": (sdegen.VP, draw(solver=diffrax.Heun())),
    "sde": (sdegen.VP, draw(stochasticity=1.0)),
    "adaptive": (sdegen.VP, draw(grid=sdegen.Adaptive())),
    "LinearSDE": (linear, draw()),
    "log_likelihood": (sdegen.VP, likelihood),
}


def equations(jaxpr) -> int:
    """The equations of a program, those of its loops and calls included."""
    total = 0
    for equation in jaxpr.eqns:
        inner = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        parts = [getattr(part, "jaxpr", part) for part in inner]
        total += 1 + sum(equations(p) for p in parts if hasattr(p, "eqns"))
    return total


def traced(name):
    """(the function of the model's arrays, those arrays) of a case."""
    process, run = CASES[name]
    arrays, static = eqx.partition(make(process()), eqx.is_array)
    return lambda arrays: run(eqx.combine(arrays, static)), arrays


def measure(name):
    """Equations and seconds of one case, in this process."""
    run, arrays = traced(name)
    start = time.perf_counter()
    lowered = jax.jit(run).lower(arrays)
    middle = time.perf_counter()
    lowered.compile()
    stop = time.perf_counter()
    return {
        "equations": equations(jax.make_jaxpr(run)(arrays).jaxpr),
        "trace and lower": middle - start,
        "compile": stop - middle,
    }


@dataclass(frozen=True)
class Config:
    cases: tuple[str, ...] = tuple(CASES)[1:]
    """The cases to measure, against the hand-written scan."""
    repeats: int = 5
    """Fresh processes of each case; medians are printed."""
    only: str | None = None
    """Measure one case in this process and print JSON: what the processes run."""
    quick: bool = False


def main(config: Config) -> None:
    if config.only:
        print(json.dumps(measure(config.only)))
        return
    config = cli.shrink(config, cases=("flow",), repeats=1)
    names = ["by hand", *config.cases]
    found = {name: [] for name in names}
    for _ in range(config.repeats):
        for name in names:
            line = [sys.executable, __file__, "--only", name]
            done = subprocess.run(line, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        name: {key: statistics.median(r[key] for r in rows) for key in rows[0]}
        for name, rows in found.items()
    }
    whole = {n: m["trace and lower"] + m["compile"] for n, m in medians.items()}
    rows = [
        {"case": n, **m, "over the scan": whole[n] / whole["by hand"]}
        for n, m in medians.items()
    ]
    print(table(rows))


if __name__ == "__main__":
    cli.run(main, Config)
