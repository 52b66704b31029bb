"""How probable are the data under a model, and how sure is that number?

    python experiments/likelihood.py

In the plane: a small network on rectified flow learns a mixture whose density is known.
Its mean log-likelihood of new draws stands beside the truth, with the exact divergence,
with random probes and their error bar, as a variational bound, and by the exact
denoiser; then the score matching error (the loss without its irreducible part), and the
Wasserstein distance that it allows beside the one that the samples have, by the flow
and by the reverse SDE.

The digits: the quickstart's network, trained on dequantised digits, in bits per
dimension on its training half, on the held-out half and on its own samples, beside a
Gaussian fit of the training half. Expect 1.84, 1.95 and 2.13 bits (the fit: 2.90, 3.00,
3.01), and about seven minutes on two CPU cores in all.

Figures: plane.png (the model's log-likelihood against the true one, and the errors of
random probes in units of their error bar), digits.png (bits per dimension by set).
"""

from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
from scipy.stats import multivariate_normal

import sdegen
from sdegen import cli, metrics, nets, prediction
from sdegen.data import Mixture, digits
from sdegen.runs import Recorder, plots, table

LEVELS = 17  # the digits' pixels are 0 to 16


@dataclass(frozen=True)
class Config:
    problems: tuple[str, ...] = ("plane", "digits")
    """Which problems: plane, digits."""
    steps: int = 4000
    """Training steps in the plane."""
    points: int = 1000
    """New draws in the plane."""
    network: nets.UNetConfig | nets.MLPConfig = nets.UNetConfig(channels=24)
    """The digits' network."""
    digits_steps: int = 1800
    """Its training steps."""
    images: int = 256
    """Images of each set that are scored."""
    probes: int = 4
    """Random probes per image."""
    seed: int = 0
    """Of data, networks, training and probes."""
    quick: bool = False
    """A run of seconds that only shows that everything works."""
    out: Path = Path("runs/likelihood")
    """Directory for config.json, rows.jsonl and the figures."""


def mean(values, bars=None) -> dict[str, object]:
    """The mean over samples, and its standard error: of the sample, or from `bars`."""
    values = np.asarray(values, np.float64)
    spread = values.std() if bars is None else np.sqrt(np.mean(np.square(bars)))
    return {"nats": values.mean(), "+-": float(spread / np.sqrt(len(values)))}


def plane(config, recorder):
    mixture = Mixture(
        [0.3, 0.5, 0.2], [[-1.0, 0.3], [0.7, 0.2], [0.1, -0.8]], [0.3, 0.2, 0.35]
    )
    key = jax.random.key(config.seed)
    keys = jax.random.split(key, 8)
    data, x = map(mixture.sample, keys[:2], (20_000, config.points))
    path = sdegen.RectifiedFlow()
    network = nets.MLPConfig()((2,), keys[2])
    model = sdegen.Denoiser(network, path, prediction.velocity, data.std())
    how = {"steps": config.steps, "batch_size": 512, "seed": config.seed}
    model, exact = sdegen.fit(model, data, **how).model, mixture.denoiser(path)
    truth = jax.vmap(lambda x: mixture.log_prob(path, path.t_min, x))(x)
    ours = sdegen.log_likelihood(model, x)
    # Gaussian probes: in the plane those of signs have only two values, up to sign
    options = {"probes": 16, "probe_noise": "gaussian"}
    probed = sdegen.log_likelihood(model, x, key=keys[3], **options)
    bound = sdegen.variational_bound(model, x, key=keys[4], draws=64)
    perfect = sdegen.log_likelihood(exact, x)
    rows = [
        {"log p of new draws": "the true density (minus the entropy)"} | mean(truth),
        {"log p of new draws": "exact denoiser, exact divergence"}
        | mean(perfect.value)
        | {"+-": float(perfect.solver_error.mean())},
        {"log p of new draws": "model, exact divergence"}
        | mean(ours.value)
        | {"+-": float(ours.solver_error.mean())},
        {"log p of new draws": "model, 16 probes"}
        | mean(probed.value, probed.standard_error),
        {"log p of new draws": "model, variational bound"}
        | mean(bound.value, bound.standard_error),
    ]
    print(f"\nthe plane, nats per sample of {config.points} draws\n" + table(rows))
    print("+- is of the draws for the truth, of the solver for an exact divergence, of")
    print("probes or times for the rest, given the draws")
    for row in rows:
        recorder.row(problem="plane", **row)
    loss_of = eqx.filter_jit(sdegen.denoising_loss)
    loss = loss_of(model, keys[5], data)
    excess = loss_of(model, keys[5], data, exact=exact)
    print(f"\nloss {loss:.4f}, of which the model can still remove {excess:.5f}")
    recorder.row(problem="plane", loss=float(loss), excess=float(excess))
    z, rows = jax.random.normal(keys[6], x.shape), []
    start = path.alpha(path.t_max) * x + path.sigma(path.t_max) * z
    samplers = {"flow": 0.0, "reverse SDE": 1.0}
    for name, level in list(samplers.items())[: 1 if config.quick else None]:
        limit = sdegen.wasserstein_bound(model, exact, x, z, stochasticity=level)
        options = {"start": start, "stochasticity": level}
        options |= {"grid": sdegen.LogSNRGrid(200)}
        drawn, true = (
            sdegen.sample(keys[7], one, x.shape, **options).x for one in (model, exact)
        )
        row = {
            "sampler": name,
            "W2 model, exact": metrics.w2(drawn, true),
            "of the same starts": np.sqrt(((drawn - true) ** 2).sum(1).mean()).item(),
            "the bound": float(limit.value),
            "I(T)": float(limit.growth),
        }
        rows.append(row)
        recorder.row(problem="plane", **row)
    print("\n" + table(rows))
    print("W2 of two sets has a floor; the distance of the same starts is above W2")
    score = (probed.value - ours.value) / probed.standard_error
    labels = {"xlabel": "true log p, nats", "ylabel": "the model's"}
    file = config.out / "plane.png"
    plots.calibration(file, *map(np.asarray, (truth, ours.value, score)), **labels)


def dequantised_loss(denoiser, key, images, cond=None, **options):
    """The denoising loss on a fresh draw from the pixels' bins."""
    data_key, key = jax.random.split(key)
    x0 = sdegen.dequantise(data_key, images, levels=LEVELS)
    return sdegen.denoising_loss(denoiser, key, x0, cond, **options)


def gaussian_bits(train, images, key):
    """Bits per dimension of a Gaussian with the moments of dequantised `train`."""
    fitted = sdegen.dequantise(key, train, levels=LEVELS).reshape(len(train), -1)
    x = sdegen.dequantise(key, images, levels=LEVELS).reshape(len(images), -1)
    normal = multivariate_normal(fitted.mean(0), np.cov(fitted.T))
    return np.log2((LEVELS - 1) / 2) - normal.logpdf(x) / (x.shape[1] * np.log(2))


def digit_images(config, recorder):
    (train, _), (held, _) = digits(config.seed)
    whole = lambda x: np.round((x + 1) * 8).astype(np.int32)  # noqa: E731
    train, held = whole(train), whole(held)
    key = jax.random.key(config.seed)
    shape = train.shape[1:]
    network = config.network(shape, jax.random.fold_in(key, 0))
    denoiser = sdegen.Denoiser(
        network,
        sdegen.RectifiedFlow(),
        prediction.velocity,
        sigma_data=float(train.std()) * 2 / LEVELS,
    )
    fit = sdegen.fit(
        denoiser,
        train.astype(np.float32),
        steps=config.digits_steps,
        batch_size=64,
        seed=config.seed,
        optimizer=sdegen.AdamW(learning_rate=3e-3, warmup=50),
        loss=dequantised_loss,
        ema=0.998,
    )
    first = jax.random.fold_in(key, 1)
    drawn = sdegen.sample(first, fit.model, (config.images, *shape))
    own = np.floor((np.asarray(drawn.x) + 1) / 2 * LEVELS)
    own = np.clip(own, 0, LEVELS - 1).astype(np.int32)
    sets = {
        "training half": train[: config.images],
        "held-out half": held[: config.images],
        "own samples": own,
    }
    rows, values = [], {}
    for name, images in sets.items():
        found = sdegen.bits_per_dim(
            fit.model,
            images,
            key=jax.random.fold_in(key, 2),
            levels=LEVELS,
            probes=config.probes,
            grid=sdegen.Adaptive(1e-3, 1e-3),
        )
        if not bool(found.ok.all()):
            raise ValueError(f"the likelihood of the {name} did not reach the noise.")
        average, bar = found.mean_and_error
        gauss = gaussian_bits(train, images, jax.random.fold_in(key, 3))
        x0 = sdegen.dequantise(jax.random.fold_in(key, 4), images, levels=LEVELS)
        fifth = jax.random.fold_in(key, 5)
        bound = sdegen.variational_bound(fit.model, x0, key=fifth, draws=32)
        unit = x0[0].size * np.log(2)
        row = {
            "images": name,
            "bits/dim": average,
            "+-": bar,
            "probes +-": np.sqrt((found.standard_error**2).mean() / len(images)).item(),
            "solver": float(found.solver_error.mean()),
            "bound": float(np.log2(LEVELS / 2) - bound.value.mean() / unit),
            "Gaussian": float(gauss.mean()),
            "evaluations": int(found.evaluations),
        }
        rows.append(row)
        recorder.row(problem="digits", **row)
        values[name] = found.value
    print(f"\nthe digits, {config.images} images of {LEVELS} levels\n" + table(rows))
    print("+- is of the images drawn, probes +- that of the divergence, solver the")
    print(f"solves' own estimate; all in bits. Uniform pixels: {np.log2(LEVELS):.3f}.")
    label = "bits per dimension"
    plots.density(config.out / "digits.png", values, bins=25, xlabel=label)


def main(config: Config) -> None:
    config = cli.shrink(
        config,
        steps=100,
        points=50,
        network=nets.MLPConfig(width=16, depth=1),
        digits_steps=5,
        images=4,
        probes=2,
    )
    with Recorder(config.out, config) as recorder:
        for name in config.problems:
            {"plane": plane, "digits": digit_images}[name](config, recorder)
    print(f"\nfigures and rows.jsonl in {config.out}")


if __name__ == "__main__":
    cli.run(main, Config)
