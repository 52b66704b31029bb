"""What a log-likelihood costs and how exact it is: ratios and errors, from one run.

    python experiments/bench_likelihood.py

First, on mixtures with the exact velocity (rectified flow, float64, three Gaussians in
the plane and eight in 64 dimensions): the error in nats, at the tolerance that most
libraries take (1e-5) and at others, evaluations, and CPU time per point. Then the cost
of one evaluation, a velocity with its divergence, in network calls (the time of a
solve of fixed steps over evaluations x one jitted call, in process CPU time and in turn
with it). Expect about 1.3 calls for the exact divergence of an MLP in the plane and 27
in 64 dimensions, 2 with one probe of a UNet and about one for each further one. About
four minutes.
"""

import itertools
import time
from dataclasses import dataclass

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import sdegen
from sdegen import cli, nets
from sdegen.data import Mixture
from sdegen.runs import table


@dataclass(frozen=True)
class Config:
    batch_size: int = 64
    """Samples per call of the networks."""
    steps: int = 4
    """Steps of the solves whose cost is measured."""
    rounds: int = 7
    """Measurements of each, in turn."""
    quick: bool = False
    """A run of seconds that only shows that everything works."""


def clock(run):
    began = time.process_time()
    out = jax.block_until_ready(run())
    return time.process_time() - began, out


def mixtures():
    plane = Mixture(
        [0.3, 0.5, 0.2], [[-1.0, 0.3], [0.7, 0.2], [0.1, -0.8]], [0.3, 0.2, 0.5]
    )
    random = np.random.default_rng(0)
    means = 0.5 * random.normal(size=(8, 64))
    wide = Mixture(random.dirichlet(3 * np.ones(8)), means, random.uniform(0.2, 0.5, 8))
    return {"2-D": (plane, 512), "64-D": (wide, 64)}


def settings(quick):
    """Tolerance, probes and solver of every row."""
    if quick:
        return [(1e-3, "exact", diffrax.Tsit5())]
    tolerances, divergences = (1e-3, 1e-5, 1e-7), ("exact", 1, 16)
    both = (diffrax.Tsit5(), diffrax.Dopri5())
    return itertools.product(tolerances, divergences, both)


def errors(config):
    """A row per problem, tolerance and way to take the divergence."""
    path, key = sdegen.RectifiedFlow(), jax.random.key(0)
    for name, (mixture, points) in mixtures().items():
        t, (data, noise) = path.t_min, jax.random.split(key)
        x0 = mixture.sample(data, points)
        x = path.alpha(t) * x0 + path.sigma(t) * jax.random.normal(noise, x0.shape)
        truth = jax.vmap(lambda x: mixture.log_prob(path, t, x))(x)  # noqa: B023
        denoiser = mixture.denoiser(path)
        for tolerance, probes, solver in settings(config.quick):
            options = {"grid": sdegen.Adaptive(tolerance, tolerance)}
            options |= {"solver": solver, "probes": probes, "key": key}

            def run(denoiser=denoiser, x=x, options=options):
                return sdegen.log_likelihood(denoiser, x, **options)

            run()
            seconds, out = clock(run)
            gap = np.asarray(out.value - truth)
            yield {
                "mixture": name,
                "tolerance": f"{tolerance:g}",
                "divergence": "exact" if probes == "exact" else f"{probes} probes",
                "solver": type(solver).__name__,
                "evaluations": int(out.evaluations),
                "RMSE": f"{np.sqrt(np.mean(gap**2)):.1e}",
                "said (solver)": f"{float(out.solver_error.mean()):.1e}",
                "said (probes)": f"{float(out.standard_error.mean()):.1e}",
                "CPU ms": 1e3 * seconds,
            }


def costs(config):
    """The cost of an evaluation in network calls."""
    key, batch = jax.random.key(0), config.batch_size
    cases = {
        "MLP, 2-D": (nets.MLPConfig(), (2,), ("exact", 1, 4)),
        "MLP, 16-D": (nets.MLPConfig(), (16,), ("exact", 1, 4)),
        "MLP, 64-D": (nets.MLPConfig(), (64,), ("exact", 1, 16)),
        "UNet, 8x8": (nets.UNetConfig(), (8, 8, 1), (1, 4, "exact")),
    }
    for name, (config_of, shape, probes) in cases.items():
        network = config_of(shape, key)
        denoiser = sdegen.Denoiser(network, sdegen.RectifiedFlow())
        x = jax.random.normal(key, (batch, *shape))
        leaves, structure = jax.tree.flatten(network)

        @jax.jit
        def call(leaves, t, x, structure=structure):
            return jax.tree.unflatten(structure, leaves)(t, x, None)

        def one(leaves=leaves, x=x, call=call):
            for _ in range(10):
                out = call(leaves, jnp.zeros(len(x)), x)
            return out

        for kind in probes[: 1 if config.quick else None]:

            def run(kind=kind, x=x, denoiser=denoiser):
                how = {"solver": diffrax.Tsit5(), "grid": config.steps}
                return sdegen.log_likelihood(denoiser, x, key=key, probes=kind, **how)

            count, ratios = int(run().evaluations), []
            one()
            for _ in range(config.rounds):
                unit = clock(one)[0] / 10
                ratios.append(clock(run)[0] / (count * unit))
            low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
            yield {
                "network": name,
                "divergence": "exact" if kind == "exact" else f"{kind} probes",
                "network calls": median,
                "quartiles": f"{low:.2f} to {high:.2f}",
            }
        if config.quick:
            return


def main(config: Config) -> None:
    config = cli.shrink(config, steps=2, rounds=1, batch_size=8)
    with jax.enable_x64(True):
        print(table(list(errors(config))))
    print("\none velocity with its divergence, in network calls")
    print(table(list(costs(config))))


if __name__ == "__main__":
    cli.run(main, Config)
