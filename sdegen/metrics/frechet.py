"""The Fréchet distance of two sets of images, seen through a network's features.

    F = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))                                 (1)

with the mean m and the covariance S of the features (Heusel et al. 2017, "GANs trained
by a two time-scale update rule", equation (6)): W_2^2 of two Gaussians. With the
features of Inception-v3 it is the FID; see docs/metrics.md.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..runs.recorder import progress_bar
from .gaussian import Moments, gaussian_w2
from .points import Points


def frechet(
    real: Points | Moments,
    fake: Points | Moments,
    *,
    features: Callable | None = None,
    batch_size: int = 128,
    progress: bool = True,
) -> float:
    """The Fréchet distance (1), in (units of the features)^2.

    Biased upwards by c / n, where c depends on the model (Chong & Forsyth 2020; about
    0.75 d^2 for two sets of N(0, I)), so always use the same number of images. d^3
    time, 5 to 25 s at d = 2048 on two cores.

    **Arguments:**
    - `real`, `fake`: images (n, height, width, channels) or any points; or `Moments` of
      features, which add up over parts that do not fit into memory.
    - `features`: maps a batch to (batch, d), best under `jax.jit`; default the points
      themselves. All batches have one size: the last is filled with copies.
    - `batch_size`: images to a batch, default 128.
    - `progress`: a progress bar, on process 0.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    a, b = (
        x if isinstance(x, Moments) else _moments(x, features, batch_size, progress)
        for x in (real, fake)
    )
    if a.mean.shape != b.mean.shape:
        found = f"{len(a.mean)} and {len(b.mean)}"
        raise ValueError(f"real and fake need features of one dimension, got {found}.")
    return gaussian_w2(a.mean, a.cov, b.mean, b.cov) ** 2


def _moments(x, features, batch_size, progress) -> Any:
    if features is None:
        return Moments.of(x)
    x = np.asarray(x)
    if x.ndim == 0 or len(x) < 2:
        raise ValueError(
            f"frechet needs two or more images of shape (n, ...), got {x.shape}."
        )
    size, total = min(batch_size, len(x)), None
    with progress_bar(-(-len(x) // size), progress) as bar:
        for start in range(0, len(x), size):
            batch = x[start : start + size]
            filled = np.resize(batch, (size, *x.shape[1:]))
            found = np.asarray(features(filled))
            if found.ndim != 2 or len(found) != size:
                raise ValueError(
                    f"features must map a batch of shape {filled.shape} to "
                    f"({size}, d), got {found.shape}. Pool over height and width."
                )
            part = Moments.of(found[: len(batch)])
            total = part if total is None else total + part
            bar.update()
    return total
