"""How long and how straight the paths of a flow are, from the frames of a sampler.

With s in [0, 1] the share of the time that has passed, Z_s the path of a sample,

    energy = int_0^1 E|dZ/ds|^2 ds  >=  E|Z_1 - Z_0|^2  >=  W_2^2(Z_0, Z_1)         (1)
    NPE = |energy - W_2^2| / W_2^2                                                  (2)
    S = int_0^1 E|(Z_1 - Z_0) - dZ/ds|^2 ds = energy - E|Z_1 - Z_0|^2               (3)

(1) is Benamou & Brenier 2000; (2) the normalised path energy of Tong et al. 2023,
"Improving and generalizing flow-based generative models with minibatch optimal
transport"; (3) the straightness of Liu et al. 2023, "Flow straight and fast". S = 0 is
straight; only energy = W_2^2 is optimal transport.

Frames stand for the broken line through them, so energy and S are too small by
O(1 / frames^2).
"""

from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import ArrayLike, Shaped

from .points import points
from .wasserstein import w2

Frames: TypeAlias = Shaped[ArrayLike, "frames batch ..."]
Times: TypeAlias = Shaped[ArrayLike, " frames"]


class PathEnergy(NamedTuple):
    """Energy of the paths and W_2^2 of their ends, in (units of the data)^2.

    `excess` is energy - W_2^2; `normalised`, |excess| / W_2^2 of (2), has no unit.
    """

    energy: float
    w2_squared: float
    excess: float
    normalised: float


def path_energy(
    frames: Frames, times: Times, *, w2_squared: float | int | None = None
) -> PathEnergy:
    """The kinetic energy (1) of a flow, against what the best transport needs.

    The clock is that of `times`, stretched to [0, 1]. The paths must be of one space
    all along: of a rectified flow, or of a path with alpha + sigma = 1. For a
    stochastic sampler the energy grows without bound with the frames.

    **Arguments:**
    - `frames`, `times`: as in `trajectory` and `times` of a `Solution`.
    - `w2_squared`: W_2^2 between the distributions of the two ends, where it is known.
      Default that of the first frame to the last, exactly (`w2`: batch^3 time), which
      is too large for few points, and the excess then too small.
    """
    z, ds = _broken_line(frames, times)
    if w2_squared is None:
        w2_squared = w2(z[0], z[-1]) ** 2
    energy = float(np.sum(_mean_square(np.diff(z, axis=0)) / ds))
    excess = energy - float(w2_squared)
    with np.errstate(divide="ignore", invalid="ignore"):
        normalised = float(np.abs(excess) / np.float64(w2_squared))
    return PathEnergy(energy, float(w2_squared), excess, normalised)


def straightness(frames: Frames, times: Times) -> float:
    """S of (3), in (units of the data)^2: 0 for straight paths at even speed.

    **Arguments:**
    - `frames`, `times`: as in `trajectory` and `times` of a `Solution`.
    """
    z, ds = _broken_line(frames, times)
    gaps = (z[-1] - z[0]) - np.diff(z, axis=0) / ds[:, None, None]
    return float(np.sum(ds * _mean_square(gaps)))


def _mean_square(z):
    return np.sum(z**2, axis=2).mean(axis=1)


def _broken_line(frames, times):
    """Frames as (frames, batch, d), and the shares of time between them."""
    frames, times = np.asarray(frames), np.asarray(times, np.float64)
    if frames.ndim < 2 or len(frames) < 2 or times.shape != frames.shape[:1]:
        raise ValueError(
            "expected two or more frames of shape (frames, batch, ...) and their times "
            f"of shape (frames,), got {frames.shape} and {times.shape}."
        )
    steps = np.diff(times)
    if not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError(
            "times must only rise or only fall, and be finite; got steps from "
            f"{steps.min():g} to {steps.max():g}. Leave out frames at equal times."
        )
    z = points(frames, "frames").reshape(*frames.shape[:2], -1)
    return z, steps / (times[-1] - times[0])
