"""Why a step gave a number that is not finite: what is to be seen of it, in words."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..losses.per_sample import sample_keys
from .compiled_loop import augment_key
from .feed import as_float, take

_LARGE = 1e15  # whose squares, summed, come near the end of float32


def cause(run: Any, step: int, metrics: Mapping[str, Any]) -> str:
    """What made `step` not finite, and what to do, in a sentence or two.

    **Arguments:**
    - `run`: the run, with its state before `step`.
    - `metrics`: what the step gave.
    """
    trained = run.state.trained
    if bad := _not_finite(trained):
        return f"The network has NaN or infinity in {bad}. Look at its initial values."
    numbers = eqx.filter(run.model.with_trained(None), eqx.is_inexact_array)
    if bad := _not_finite(numbers):
        return f"The model has NaN or infinity in {bad}. Look at how it was made."
    for place, a in jax.tree.leaves_with_path(numbers):
        if "sigma_data" in jax.tree_util.keystr(place) and not bool(jnp.all(a > 0)):
            return (
                f"The model's sigma_data is {float(a.min()):g}, and must be positive: "
                "give it the standard deviation of the data, data.std()."
            )
    if text := _of_batch(run, step):
        return text
    unsolved = {k: float(v) for k, v in metrics.items() if k.endswith("_unsolved")}
    for name, share in unsolved.items():
        if not share <= 0:
            return (
                f"The plans of the coupling did not reach their tolerance (the column "
                f"{name} is {share:g}). Give it more max_iterations, or a larger "
                "regularisation."
            )
    if np.isfinite(metrics["grad_norm"]):
        return (
            "The gradient is finite and the update is not: try a smaller learning rate."
        )
    if np.isfinite(metrics["loss"]):
        return (
            "The loss is finite and its gradient is not: look for a square root, a "
            "norm or a division whose argument may be 0 in the loss or the network; "
            "if there is none, try a smaller learning rate or more warm-up."
        )
    if step == 0:
        return (
            "It is the first step, before anything was learnt: look at the loss, the "
            "network and the scale of the data, not at the learning rate."
        )
    return "Try a smaller learning rate or more warm-up."


def _not_finite(tree):
    """The place of the first array of `tree` that is not finite, or ""."""
    for place, a in jax.tree.leaves_with_path(tree):
        if eqx.is_inexact_array(a) and not bool(jnp.isfinite(a).all()):
            return jax.tree_util.keystr(place).removesuffix(".value") or "it"
    return ""


def _of_batch(run, step):
    """What is wrong with the data of the step, or ""."""
    feed, source = run.feed, "data" if run.feed.stream is None else "stream"
    with feed.chunks(step, iter([1])) as chunks:
        fed = jax.tree.map(lambda a: a[0], next(iter(chunks)))
    x, cond = take(feed.arrays, fed)
    for name, part in (("", x), (" conditions of the", cond)):
        if _not_finite(part):
            return (
                f"The{name} batch of this step, from the {source}, holds NaN or "
                "infinity. Repair or remove it."
            )
    if run.config.augment is not None:
        keys = sample_keys(augment_key(run.key, step), jnp.arange(len(x)))
        x = jax.vmap(run.config.augment)(keys, x)
        if _not_finite(x):
            return "The augmentation made NaN or infinity of a batch that has none."
    most = float(jnp.abs(as_float(x)).max())
    if most > _LARGE:
        return (
            f"The batch of this step, from the {source}, holds numbers of size "
            f"{most:.1e}, whose squares {x.dtype} does not hold. Scale the data to a "
            "size of about 1."
        )
    return ""
