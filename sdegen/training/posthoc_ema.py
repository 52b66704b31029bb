"""Averages of any length after training, from the snapshots of a run.

`fit(ema=[Power(0.05), Power(0.10)], directory=RUN)` leaves snapshots of its averages;
this finds the weighted sum of them that is closest to an average of another relative
width `std`, at the last step or at `--step`, and writes it as a checkpoint of the
network. Equations in `sdegen.ema`; Karras et al. 2024, section 3.2.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..runs import checkpoint
from .ema import posthoc_weights


def snapshots(run: str | Path) -> tuple[list[int], list[float]]:
    """The steps of the snapshots of `run`, a directory, and the widths at each."""
    kept = _kept(run)
    steps = kept.steps()
    if not steps:
        raise FileNotFoundError(
            f"no snapshots of averages in {kept.directory}: train with fit(ema="
            "[sdegen.ema.Power(0.05), sdegen.ema.Power(0.10)], directory=...)."
        )
    return steps, kept.metadata(steps[-1])["identity"]["stds"]


def _kept(run):
    return checkpoint.Checkpoints(Path(run).expanduser() / "averages", keep=None)


def reconstruct(
    run: str | Path, std: float, like: Any = None, *, step: int | None = None
) -> tuple[Any, float]:
    """The network averaged with relative width `std`.

    **Arguments:**
    - `run`: the directory of the run.
    - `std`: the width of the average relative to the time of training, below 0.28.
    - `like`: what was trained, or its shape, whose shardings the result takes; by
      default the result is a dictionary of arrays by their place.
    - `step`: the last step of the average; that of the last snapshot by default.

    **Returns:** (network, error), `error` the part of the profile that the snapshots
    cannot express, relative to its norm.

    **Raises:** ValueError for a width or a step out of range, FileNotFoundError.
    """
    if not 0 < std < 0.28:
        raise ValueError(
            f"std must be between 0 and 0.28, got {std}: it is the width of the "
            "average relative to the time of training, 0.05 to 0.15 say."
        )
    steps, stds = snapshots(run)
    step = steps[-1] if step is None else step
    if not steps[0] <= step <= steps[-1]:
        raise ValueError(
            f"step must be between {steps[0]} and {steps[-1]}, the first and the last "
            f"snapshot, got {step}."
        )
    used = [n for n in steps if n <= step]
    every = [n for n in used for _ in stds]
    weights, error = posthoc_weights(every, stds * len(used), step, std)
    wanted = {} if like is None else checkpoint.named(like)
    layout = {
        f"{j}{name}": _as_kept(a)
        for j in range(len(stds))
        for name, a in wanted.items()
    }
    kept, total = _kept(run), {}
    for n, shares in zip(used, weights.reshape(len(used), -1), strict=True):
        arrays = kept.read(n, layout or None)
        for j, share in enumerate(shares):
            part = _part(arrays, j)
            for name, array in part.items():
                total[name] = _add(total.get(name), array, share)
    total = {name: a.astype(part[name].dtype) for name, a in total.items()}
    if like is None:
        return total, error
    own = {name: total[name].astype(a.dtype) for name, a in wanted.items()}
    return checkpoint.unnamed(own, like), error


def _as_kept(a):
    """The shape of an array as averages are kept, float32 at least."""
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return a
    kind = jnp.promote_types(a.dtype, jnp.float32)
    return jax.ShapeDtypeStruct(a.shape, kind, sharding=a.sharding)


def _part(arrays, j):
    """The arrays of average number j, whose names begin with it."""
    places = {name: name.lstrip("0123456789") for name in arrays}
    return {p: arrays[n] for n, p in places.items() if n == f"{j}{p}"}


def _add(total, array, share):
    """total + share * array; whole numbers are those of the last snapshot."""
    if not eqx.is_inexact_array(array):
        return array
    scaled = float(share) * array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return scaled if total is None else total + scaled


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Averages, from a run's snapshots.")
    parser.add_argument("run", type=Path, help="directory of the run")
    stds = {"type": float, "nargs": "+", "required": True}
    parser.add_argument("--std", **stds, help="relative widths, e.g. 0.1")
    parser.add_argument("--step", type=int, help="last step of the average")
    parser.add_argument("--out", type=Path, help="default RUN/posthoc")
    arguments = parser.parse_args(argv)
    try:
        steps, stds = snapshots(arguments.run)
        widths = ", ".join(f"{std:g}" for std in stds)
        print(f"{len(steps)} snapshots of the widths {widths}, to step {steps[-1]:,}")
        for std in arguments.std:
            step = steps[-1] if arguments.step is None else arguments.step
            network, error = reconstruct(arguments.run, std, step=step)
            out = (arguments.out or arguments.run / "posthoc").expanduser().absolute()
            place = out / f"std-{std:.3f}-step-{step}"
            checkpoint.save_named(place, network)
            print(f"{place}  (the profile is met to {error:.1e})")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("Read one with sdegen.runs.checkpoint.restore(place, like=network).")


if __name__ == "__main__":
    main()
