"""One denoising loss for every path, prediction, weight, times and coupling.

    L = mean_i mean_coordinates w(t_i) |pred(t_i, x_i) - (a x0_i + b z_i)|^2,
    x_i = alpha x0_i + sigma z_i

Its minimiser is the mean of the target given x_t, whatever the coupling (Vincent 2011;
Lipman et al. 2023, theorem 2).
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

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

    **Returns:** the loss; with a coupling that has `aux`, (loss, aux).

    **Raises:** ValueError for a model, data or a coupling that do not fit.
    """
    check_model("denoising_loss", Predicts, model)
    if exact is not None and options.get("coupling", independent) is not independent:
        raise ValueError(
            "exact is the denoiser of data and noise that are independent: another "
            "coupling has another one. Take coupling=sdegen.coupling.independent."
        )
    batch = draw_batch(model, key, x0, cond, **options)
    t, x, cond, target = batch.t, batch.x_t, batch.cond, batch.target
    path, kind, sigma_data = model.path, model.prediction, model.data_scale
    if exact is not None:
        a, b = batched(lambda t: kind.row(path, t, sigma_data), t, x)
        x0, z = exact.posterior_means(t, x, cond)
        target = a * x0 + b * z
    w = batched(lambda t: weight(path, t, kind, sigma_data), t, x)
    error = model.predict(t, x, cond, keys=batch.keys) - target
    return with_aux(jnp.mean(w * error**2), batch.aux)
