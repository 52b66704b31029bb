"""Error against evaluations, for every solver of the flow and every grid.

    python experiments/solvers.py
    python experiments/solvers.py --problems digits --digits-steps 3000

Two mixtures with exact denoisers, in float64: in the plane six unequal modes on a
circle of radius 0.68 with standard deviations .05 to .15, and in 64 dimensions ten
modes in a subspace of 8 with .08 to .2; both have standard deviation .5 in all. They
start from the exact marginal of EDM's path at sigma 80 and end at sigma 0.002. The last
problem is the quickstart's network, trained here for the same digits on rectified flow.
The reference is a solve from the same starts (tolerance 1e-10; for the network, in
float32, 1e-6). RMSE is over all coordinates; median is that over samples of each one's
root mean square error. Columns are network evaluations.

Expect about 15 minutes on two CPU cores, one and a half of them training. Figures:
solvers.png (each solver at its best grid), grids.png (one solver, every grid).
"""

from dataclasses import dataclass
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import numpy as np

import sdegen
from sdegen import cli, nets, prediction, solvers, times
from sdegen.data import Mixture, digits
from sdegen.runs import Recorder, plots, table

SOLVERS = {
    "DDIM": solvers.DDIM(),
    "EDM Heun": solvers.EDMHeun(),
    "DPM-Solver-2": solvers.DPMSolver2(),
    "DPM++ 2M": solvers.DPMSolverPP(2),
    "DPM++ 3M": solvers.DPMSolverPP(3),
    "DEIS-3 eps": solvers.DEIS(3),
    "DEIS-2 velocity": solvers.DEIS(2, prediction.velocity),
    "UniPC-3 x0": solvers.UniPC(3, prediction=prediction.x0),
    "UniPC-3 eps": solvers.UniPC(3, prediction=prediction.eps),
    "UniPC-2 velocity": solvers.UniPC(2, prediction=prediction.velocity),
    "UniPC-3 edm": solvers.UniPC(3),
}
GRIDS = {
    "log-SNR": sdegen.LogSNRGrid,
    "Karras": sdegen.KarrasGrid,
    "flow time": sdegen.FlowTimeGrid,
    "cosine": lambda n: sdegen.CosineGrid(n, sigma_data=1.0, rho=1.0),
    "cosine .5, 1": lambda n: sdegen.CosineGrid(n, rho=1.0),
    "cosine .5, 1.5": sdegen.CosineGrid,
}


@dataclass(frozen=True)
class Config:
    problems: tuple[str, ...] = ("plane", "64-D", "digits")
    """Which problems: plane, 64-D, digits."""
    evaluations: tuple[int, ...] = (5, 8, 10, 15, 20, 35, 50)
    """Numbers of network evaluations."""
    learned: tuple[int, ...] = (5, 8, 10)
    """Numbers of evaluations for which a grid is learned."""
    points: int = 1000
    """Samples of the mixtures; the digits have a quarter of that."""
    digits_steps: int = 1800
    """Training steps of the digits' network."""
    seed: int = 0
    """Of the mixtures, the starts and the network."""
    quick: bool = False
    """A run of seconds that only shows that everything works."""
    out: Path = Path("runs/solvers")
    """Directory for config.json, rows.jsonl and the figures."""


def mixture(name: str, seed: int) -> Mixture:
    random = np.random.default_rng(seed)
    if name == "plane":
        angle, weights = np.arange(6) * np.pi / 3, random.dirichlet(3 * np.ones(6))
        means = 0.68 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return Mixture(weights, means, random.uniform(0.05, 0.15, 6))
    subspace = np.linalg.qr(random.normal(size=(64, 8)))[0]
    means = random.normal(size=(10, 8)) @ subspace.T
    weights = random.dirichlet(3 * np.ones(10))
    means *= np.sqrt(0.23 / (weights @ (means**2).mean(axis=1)))
    return Mixture(weights, means, random.uniform(0.08, 0.2, 10))


def exact_problem(name, config):
    modes, path = mixture(name, config.seed), sdegen.EDM()
    data, noise = jax.random.split(jax.random.key(config.seed))
    x0 = modes.sample(data, config.points)
    start = x0 + path.sigma(path.t_max) * jax.random.normal(noise, x0.shape)
    return modes.denoiser(path), start, 1e-10


def digits_problem(config):
    (train, _), _ = digits(config.seed)
    network = nets.UNetConfig(channels=24)(train.shape[1:], jax.random.key(config.seed))
    path, velocity = sdegen.RectifiedFlow(), prediction.velocity
    denoiser = sdegen.Denoiser(network, path, velocity, sigma_data=train.std())
    fit = sdegen.fit(
        denoiser,
        train,
        steps=config.digits_steps,
        batch_size=64,
        seed=config.seed,
        optimizer=sdegen.AdamW(learning_rate=3e-3, warmup=50),
        loss=eqx.Partial(sdegen.denoising_loss, times=times.Uniform()),
        ema=0.998,
    )
    shape = (config.points // 4, *train.shape[1:])
    return fit.model, jax.random.normal(jax.random.key(config.seed), shape), 1e-6


def study(name, problem, config):
    """A row per solver and grid: errors by number of evaluations."""
    (denoiser, start, tolerance), key = problem, jax.random.key(0)
    options = {"shape": start.shape, "start": start}

    def errors(grid, solver=None):
        out = sdegen.sample(key, denoiser, solver=solver, grid=grid, **options)
        square = np.mean((out.x - fine.x) ** 2, axis=tuple(range(1, start.ndim)))
        return float(square.mean() ** 0.5), float(np.median(square) ** 0.5)

    fine_grid = sdegen.Adaptive(tolerance, tolerance)
    how = options | {"solver": diffrax.Tsit5(), "grid": fine_grid}
    fine = sdegen.sample(key, denoiser, **how)
    print(f"{name}: the reference took {int(fine.evaluations)} evaluations")
    for label, solver in list(SOLVERS.items())[-1 if config.quick else 0 :]:
        for grid_name, grid in list(GRIDS.items())[-1 if config.quick else 0 :]:
            results = {
                n: errors(grid(n // solver.calls)(denoiser.path), solver)
                for n in config.evaluations
                if n >= 2 * solver.calls and n % solver.calls == 0 or n >= 15
            }
            yield {"problem": name, "solver": label, "grid": grid_name}, results
    learned = {}
    for n in config.learned:
        grid = sdegen.learn_grid(
            jax.random.key(1),
            denoiser,
            evaluations=n,
            shape=start.shape[1:],
            draws=64 if config.quick else 2048 if name != "digits" else 512,
            kept=512 if name != "digits" else 128,
            iterations=20 if config.quick else 300,
        )
        grid.save(config.out / f"{name}-{n}.json")
        learned[n] = errors(grid)
    if learned:
        row = {"problem": name, "solver": "UniPC-2 velocity, learned"}
        yield row | {"grid": "learned"}, learned


def show(rows, measure):
    for names, results in rows:
        cells = {str(n): f"{results[n][measure]:.2g}" for n in results}
        yield names | {str(n): cells.get(str(n), "-") for n in rows[0][1]}


def main(config: Config) -> None:
    small = {"problems": ("plane",), "evaluations": (4,), "learned": (4,)}
    config = cli.shrink(config, points=64, digits_steps=5, **small)
    found, panels, grids = [], {}, {}
    with Recorder(config.out, config) as recorder:
        for name in config.problems:
            with jax.enable_x64(name != "digits"):
                make = digits_problem if name == "digits" else exact_problem
                arguments = (config,) if name == "digits" else (name, config)
                rows = list(study(name, make(*arguments), config))
            for names, results in rows:
                for n, (rmse, median) in results.items():
                    recorder.row(**names, evaluations=n, rmse=rmse, median=median)
            found += rows
            for measure, title in enumerate(("RMSE", "median")):
                print(f"\n{name}, {title}\n" + table(list(show(rows, measure))))
                best, each = {}, {}
                for names, results in rows:
                    line = best.setdefault(names["solver"], {})
                    for n, value in results.items():
                        line[n] = min(line.get(n, np.inf), value[measure])
                    if names["solver"] == "UniPC-3 edm":
                        own = {n: v[measure] for n, v in results.items()}
                        each[names["grid"]] = own
                for where, lines in ((panels, best), (grids, each)):
                    where[f"{name}: {title}"] = {
                        k: (list(v), list(v.values())) for k, v in lines.items() if v
                    }
    label = "network evaluations"
    plots.error_curves(config.out / "solvers.png", panels, xlabel=label)
    plots.error_curves(config.out / "grids.png", grids, xlabel=label)
    print(f"\nfigures: {config.out}/solvers.png, grids.png; rows in rows.jsonl")


if __name__ == "__main__":
    cli.run(main, Config)
