"""One denoising loss for every path, prediction, weight, times and coupling.

    L = mean_i mean_coordinates w(t_i) |pred(t_i, x_i) - (a x0_i + b z_i)|^2,
    x_i = alpha x0_i + sigma z_i

Its minimiser is the mean of the target given x_t, whatever the coupling (Vincent 2011;
Lipman et al. 2023, theorem 2).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..processes.normaliser import check_units
from ..processes.path import batched
from ..processes.prediction import PosteriorMeans
from ..typing import PyTree, Seed
from . import weight as weights
from .batch import Data, Predicts, check_model, draw_batch
from .coupling.pairs import Loss, independent, with_aux


def denoising_loss(
    model: PyTree,
    key: Seed,
    x0: Data,
    cond: PyTree = None,
    *,
    weight: Callable = weights.uniform,
    exact: PosteriorMeans | None = None,
    stable: bool = False,
    **options: Any,
) -> Loss:
    """The mean weighted squared error per coordinate of the prediction, on a batch.

    **Arguments:**
    - `model`: a `Denoiser`, or what has its `predict` and what that needs.
    - `key`, `x0`, `cond`, and the options `coupling`, `times`, `axis_name`: see
      `draw_batch`.
    - `weight`: the weight at time t, see `sdegen.weight`; `uniform`, which is 1.
    - `exact`: a denoiser (of a mixture, or of the data set) whose prediction is the
      target in place of that of the drawn x0 and z: the loss is then the score matching
      error alone, 0 for the exact prediction. None by default.
    - `stable`: the target is the posterior mean over all data of the batch in place of
      the drawn pair, which has less variance, most of all for heavy-tailed noise (Xu et
      al. 2023, "Stable target field"). Its minimiser is biased by 1 / batch. Every
      device takes its own part of the batch; without conditions only. False.

    **Returns:** the loss; with a coupling that has `aux`, (loss, aux).

    **Raises:** ValueError for a model, data or a coupling that do not fit.
    """
    check_model("denoising_loss", Predicts, model)
    if exact is not None and options.get("coupling", independent) is not independent:
        raise ValueError(
            "exact is the denoiser of data and noise that are independent: another "
            "coupling has another one. Take coupling=sdegen.coupling.independent."
        )
    if exact is not None:
        check_units("denoising_loss", model.path, exact.path)
    if stable and not (exact is None and cond is None):
        raise ValueError(
            "stable takes the batch for the data of every sample: it goes with neither "
            "cond nor exact. Leave one of them out."
        )
    batch = draw_batch(model, key, x0, cond, **options)
    t, x, cond, target = batch.t, batch.x_t, batch.cond, batch.target
    path, kind, sigma_data = model.path, model.prediction, model.data_scale
    if exact is not None or stable:
        a, b = batched(lambda t: kind.row(path, t, sigma_data), t, x)
        x0, z = exact.posterior_means(t, x, cond) if exact else _means(path, batch)
        target = a * x0 + b * z
    w = batched(lambda t: weight(path, t, kind, sigma_data), t, x)
    error = model.predict(t, x, cond, keys=batch.keys) - target
    return with_aux(jnp.mean(w * error**2), batch.aux)


def _means(path, batch):
    """E[x0 given x_t] and E[z given x_t] of each sample, for data like the batch."""

    def one(t, x):
        alpha, sigma = path.scales(t)
        density = jax.vmap(lambda x0: path.noise.log_prob((x - alpha * x0) / sigma))
        share = jax.nn.softmax(density(batch.x0))
        x0 = jnp.tensordot(share, batch.x0, 1)
        return x0, (x - alpha * x0) / sigma

    # Some samples at a time: all pairs of images would not fit.
    each = (batch.t.astype(batch.x_t.dtype), batch.x_t)
    return jax.lax.map(lambda now: one(*now), each, batch_size=32)
