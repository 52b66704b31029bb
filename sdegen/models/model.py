"""What `fit` trains and `sample` runs: a network with its process."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from ..losses.coupling.pairs import Loss
from ..typing import AxisName, PyTree, RandomKey, Scalar, Time
from .problem import AbstractProblem


def call_network(network: Any, t: Time, x: Array, cond: PyTree, **more: Any) -> Array:
    """The output of a network at times () or (batch,), which has the shape of x."""
    out = network(jnp.broadcast_to(t, x.shape[:1]), x, cond, **more)
    found = out.shape if eqx.is_array(out) else type(out).__name__
    if found != x.shape:
        raise ValueError(
            f"the network must return an array of the shape of x, {x.shape}, got "
            f"{found}. Check its output."
        )
    return out.astype(x.dtype)


class AbstractModel(eqx.Module):
    """A network with its process.

    A final of it says what of it is trained (`trainable`) and by which loss it is
    trained unless `fit` is given another (`loss`). What else a model can do it declares
    by its class: an `AbstractDenoiser` has posterior means on a path, an
    `AbstractGenerator` an equation of its own.
    """

    @property
    def trainable(self) -> tuple[str, ...]:
        """The names of the fields that training changes."""
        return ("network",)

    @property
    def trained(self) -> Any:
        """What training changes: the one trainable field, or a tuple of them."""
        values = tuple(getattr(self, name) for name in self.trainable)
        return values[0] if len(values) == 1 else values

    def with_trained(self, trained: Any) -> "AbstractModel":
        """The model with `trained` in the place of what training changes.

        None takes it all out, which leaves what training does not change.
        """
        names = self.trainable
        if trained is None or len(names) == 1:
            values = (trained,) * len(names)
        else:
            values = trained
        return dataclasses.replace(self, **dict(zip(names, values, strict=True)))

    def problem(
        self,
        shape: tuple[int, ...],
        *,
        solver: Any,
        grid: Any,
        stochasticity: Scalar | None,
        denoise: bool | None,
        refinable: bool,
        cond: PyTree,
        start: Any,
    ) -> AbstractProblem:
        """How `sample` draws from the model; the arguments are those of `sample`.

        `stochasticity` is None for the flow. Raises ValueError with a sentence for what
        the model cannot do.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be sampled: its class defines no `problem`."
        )

    def loss(
        self,
        key: RandomKey,
        x0: Any,
        cond: PyTree = None,
        *,
        axis_name: AxisName | None = None,
    ) -> Loss:
        """The default loss on a batch; the arguments are those of `denoising_loss`."""
        raise ValueError(
            f"{type(self).__name__} has no loss of its own: give fit a loss=, or "
            "define the method `loss` of the class."
        )
