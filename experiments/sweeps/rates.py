"""A first sweep: which learning rate, by how many seeds? Half a minute on a laptop."""

from denoising import Config, trial

from sdegen.sweeps import Sweep

space = {
    "optimizer.learning_rate": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
    "ema": [0.9, 0.99],
    "seed": range(4),
}
sweep = Sweep(trial, space, config=Config(steps=500, batch_size=64), metric="w2")
