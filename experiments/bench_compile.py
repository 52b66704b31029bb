"""What a first call costs before it computes: equations, tracing, lowering, compiling.

    python experiments/bench_compile.py
    python experiments/bench_compile.py --cases flow sde --repeats 5

Every case runs in fresh processes, in turn with what a script would write by hand for
the same network, and prints its seconds over those. Equations do not depend on the
machine; a test holds them (tests/test_compile.py).
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
import optax

import sdegen
from sdegen import cli, nets
from sdegen.guidance import inverse
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
    path, s = model.path, model.data_scale

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


def flow_by_hand(model):
    """The probability flow of EDM's preconditioning, as a script would write it."""
    path, s = model.path, model.data_scale

    def field(t, x, args):
        (a, b), (da, db) = path.scales_and_rates(t)
        scale = 1 / jnp.sqrt(b**2 + (a * s) ** 2)
        time = jnp.full(len(x), jnp.log(b / a) / 4)
        out = model.network(time, scale * x, None)
        x0 = a * s**2 * scale**2 * x + s * b * scale * out
        return da * x0 + db * (x - a * x0) / b

    return field


def solve_by_hand(field, x, start, stop, tolerance):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        start,
        stop,
        jnp.sign(stop - start) * 0.01,
        x,
        stepsize_controller=diffrax.PIDController(tolerance, tolerance),
        throw=False,
    ).ys


def adaptive_by_hand(model):
    """Diffrax with adaptive steps."""
    path, x = model.path, jax.random.normal(jax.random.key(1), (BATCH, 2))
    field = flow_by_hand(model)
    return solve_by_hand(field, x, path.t_max, path.t_min, 1e-4)[-1]


def likelihood(model):
    return sdegen.log_likelihood(model, jnp.zeros((BATCH, 2))).value


def likelihood_by_hand(model):
    """Diffrax on (x, log p), the divergence by forward mode."""
    path, field = model.path, flow_by_hand(model)

    def both(t, state, args):
        x, _ = state
        slope, push = jax.linearize(lambda x: field(t, x, None), x)
        columns = [jnp.broadcast_to(e, x.shape) for e in jnp.eye(2)]
        return slope, sum(jnp.sum(e * push(e), axis=1) for e in columns)

    state = jnp.zeros((BATCH, 2)), jnp.zeros(BATCH)
    (x,), (gained,) = solve_by_hand(both, state, path.t_min, path.t_max, 1e-5)
    return gained + jax.scipy.stats.norm.logpdf(x).sum(1)


def fit_by_hand(model):
    """100 steps of AdamW on the same loss, as one scan."""
    optimizer, data = optax.adamw(1e-3), jnp.zeros((1024, 2))

    def step(carry, key):
        network, state = carry

        def loss(network):
            own = model.with_trained(network)
            pick, draw = jax.random.split(key)
            x0 = data[jax.random.randint(pick, (BATCH,), 0, len(data))]
            return sdegen.denoising_loss(own, draw, x0)

        value, gradient = jax.value_and_grad(loss)(network)
        updates, state = optimizer.update(gradient, state, network)
        return (optax.apply_updates(network, updates), state), value

    arrays = eqx.filter(model.trained, eqx.is_array)
    carry, keys = (arrays, optimizer.init(arrays)), jax.random.split(jax.random.key(1))
    return jax.lax.scan(step, carry, keys)


def guided(model):
    """An inverse problem: the second coordinate, given the first."""
    seen = inverse.Measurement(lambda x: x[:1], jnp.zeros((BATCH, 1)))
    return draw()(inverse.PiGDM().guide(model, seen))


CASES = {
    "by hand": (sdegen.VP, by_hand, None),
    "adaptive by hand": (sdegen.VP, adaptive_by_hand, None),
    "likelihood by hand": (sdegen.VP, likelihood_by_hand, None),
    "fit by hand": (sdegen.VP, fit_by_hand, None),
    "flow": (sdegen.VP, draw(), "by hand"),
    "DDIM": (sdegen.VP, draw(solver=sdegen.solvers.DDIM()), "by hand"),
    "Heun": (sdegen.VP, draw(solver=diffrax.Heun()), "by hand"),
    "sde": (sdegen.VP, draw(stochasticity=1.0), "by hand"),
    "adaptive": (sdegen.VP, draw(grid=sdegen.Adaptive()), "adaptive by hand"),
    "guided": (sdegen.VP, guided, "by hand"),
    "LinearSDE": (linear, draw(), "flow"),
    "BlockSDE": (sdegen.BlockSDE, draw(), "flow"),
    "log_likelihood": (sdegen.VP, likelihood, "likelihood by hand"),
    "fit": (sdegen.VP, None, "fit by hand"),
}
"""(process, what is called with its denoiser, what its seconds are divided by)."""


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
    process, run, _ = CASES[name]
    arrays, static = eqx.partition(make(process()), eqx.is_array)
    return lambda arrays: run(eqx.combine(arrays, static)), arrays


def measure(name):
    """Equations and seconds of one case, in this process."""
    if name == "fit":
        return measure_fit()
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
        "whole": stop - start,
    }


def measure_fit():
    """The first call of `fit` less another with the same program."""
    model, data, seconds = make(sdegen.VP()), jnp.zeros((1024, 2)), []
    options = dict(steps=100, batch_size=BATCH, progress=False)
    for _ in range(2):
        start = time.perf_counter()
        sdegen.fit(model, data, **options)
        seconds.append(time.perf_counter() - start)
    # What is traced and what is compiled cannot be told apart from outside.
    return {"whole": seconds[0] - seconds[1]}


@dataclass(frozen=True)
class Config:
    cases: tuple[str, ...] = tuple(n for n, case in CASES.items() if case[2])
    """The cases to measure, each against another."""
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
    against = {CASES[name][2] for name in config.cases}
    against |= {CASES[name][2] for name in against} - {None}
    names = [n for n in CASES if n in against or n in config.cases]
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
    rows = []
    for name, row in medians.items():
        base = CASES[name][2] or name
        ratio = row["whole"] / medians[base]["whole"]
        rows.append({"case": name, **row, "against": base, "ratio": ratio})
    print(table(rows))


if __name__ == "__main__":
    cli.run(main, Config)
