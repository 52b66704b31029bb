"""Training with and without the condition (Ho and Salimans 2022, algorithm 1)."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..losses.denoising import denoising_loss
from ..losses.per_sample import batch_index, sample_keys
from ..typing import AxisName, PyTree, Scalar, Seed, is_traced, number, random_key
from .guidance import check_alike, marker, spread

_APART = 2**31 - 2  # apart from the keys that the loss draws itself


class LabelDropout(eqx.Module):
    """A loss for `fit` that hides the condition of a share `rate` of the samples.

        sdegen.fit(denoiser, data, cond=labels, loss=LabelDropout(null, 0.1))

    **Arguments:**
    - `null`: the condition of one sample that stands for none, a pytree.
    - `rate`: the share of hidden conditions; 0.1.
    - `loss`: one with the arguments of `denoising_loss`, which is the default.
    """

    null: PyTree = eqx.field(converter=marker)
    rate: Scalar = number(0.1)
    loss: Callable = denoising_loss

    def __check_init__(self):
        if not is_traced(self.rate) and not 0 <= float(self.rate) <= 1:
            raise ValueError(f"rate is the share hidden, 0 to 1, got {self.rate}.")

    def __call__(
        self,
        denoiser: eqx.Module,
        key: Seed,
        x0: Float[Array, "batch ..."],
        cond: PyTree = None,
        *,
        axis_name: AxisName | None = None,
    ) -> Scalar:
        """The loss of the batch with some conditions hidden."""
        check_alike(cond, self.null, len(x0))
        key = random_key(key)
        index, _ = batch_index(len(x0), axis_name)
        keys = sample_keys(jax.random.fold_in(key, _APART), index)
        hidden = jax.vmap(lambda k: jax.random.uniform(k, ()))(keys) < self.rate

        def hide(leaf, blank):
            mask = hidden.reshape(hidden.shape + (1,) * (leaf.ndim - 1))
            return jnp.where(mask, blank.astype(leaf.dtype), leaf)

        cond = jax.tree.map(hide, cond, spread(self.null, len(x0)))
        return self.loss(denoiser, key, x0, cond, axis_name=axis_name)
