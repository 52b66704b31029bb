"""What `fit` trains and `sample` runs: a network with its process."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..losses.coupling.pairs import Loss
from ..processes.path import AbstractPath
from ..typing import (
    PyTree,
    ScalarLike,
    Time,
    argument_order,
    check_labels,
    condition_arrays,
    data_array,
    is_labels,
)
from .problem import AbstractProblem

Points: TypeAlias = Float[Array, "batch ..."]
"""A batch of points, or of what a model says of each of them."""


def call_network(network: Any, t: Time, x: Array, cond: PyTree, **more: Any) -> Array:
    """The output of a network at times () or (batch,), which has the shape of x."""
    cond = condition_arrays(cond, len(x))
    check_network(network)
    out = network(jnp.broadcast_to(t, x.shape[:1]), x, cond, **more)
    found = out.shape if eqx.is_array(out) else type(out).__name__
    if found != x.shape:
        raise ValueError(
            f"the network must return an array of the shape of x, {x.shape}, got "
            f"{found}. Check its output; sdegen.nets.wrap(network) takes the mean of "
            "(mean, variance) or of twice the channels, and wrap(network, output=...) "
            "another part."
        )
    return out.astype(x.dtype)


def check_network(network: Any) -> None:
    """Refuse what cannot be called as a network (t, x, cond); `wrap` is the remedy."""
    order = argument_order(network)
    try:
        inspect.signature(network).bind(0, 0, 0)
    except TypeError:  # too few parameters, too many, or nothing to call
        fits = False
    except ValueError:  # a builtin, which does not say
        fits = True
    else:
        fits = order is None or order[:2] == ("t", "x")
    if not fits:
        came = "" if order is None else f", which takes ({', '.join(order)})"
        example = 'order=("x", "t")' if order is None else ""
        raise ValueError(
            f"a network is called as network(t, x, cond), got {network!r:.60}{came}. "
            f"Wrap it: sdegen.nets.wrap(network{', ' * bool(example)}{example})."
        )


def conditions(model: Any, cond: PyTree, batch: int) -> PyTree:
    """The condition of a batch, checked before anything is traced.

    **Raises:** a ValueError as `condition_arrays`, and for labels that are out of range
    for the network of the model.
    """
    cond = condition_arrays(cond, batch)
    dim = getattr(getattr(model, "network", None), "cond_dim", 0)
    if dim > 1 and is_labels(cond):
        check_labels(cond, dim)
    return cond


def of_one(method: Callable, t: ScalarLike, x: Array, cond: PyTree, *more) -> Array:
    """A method for batches, (t, x, cond, ...), of one sample."""
    cond = jax.tree.map(lambda c: c[None], cond)
    return method(t, x[None], cond, *more)[0]


def floating_batch(x: Any, what: str, advice: str = "") -> Array:
    """`x` as an array, if it is floating-point data; see `data_array`."""
    return jnp.asarray(data_array(x, what, advice=advice))


def check_gaussian(path: AbstractPath, what: str, advice: str = "") -> None:
    """Refuse a path with other noise; `what` ends in its verb."""
    if not path.noise.gaussian:
        raise ValueError(
            f"{what} Gaussian noise, and {type(path).__name__} has "
            f"noise={type(path.noise).__name__}.{advice}"
        )


class AbstractModel(eqx.Module):
    """A network with its process: what is trained of it, by which loss by default.

    An `AbstractDenoiser` has posterior means on a path, an `AbstractGenerator` an
    equation of its own.
    """

    trainable: ClassVar = ("network",)
    """The names of the fields that training changes."""

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
        values = (trained,) if len(names) == 1 else trained
        if trained is None:
            # An optional network becomes (), as None would say that there is none.
            optional = {f.name for f in dataclasses.fields(self) if f.default is None}
            values = [() if name in optional else None for name in names]
        return dataclasses.replace(self, **dict(zip(names, values, strict=True)))

    def problem(
        self, shape, *, solver, grid, stochasticity, denoise, refinable, cond, start
    ) -> AbstractProblem:
        """How `sample` draws from the model; the arguments are those of `sample`.

        `stochasticity` is None for the flow. What the model cannot do is a ValueError.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be sampled: its class defines no `problem`."
        )

    def loss(self, key, x0, cond=None, *, axis_name=None) -> Loss:
        """The default loss on a batch; the arguments are those of `denoising_loss`."""
        raise ValueError(
            f"{type(self).__name__} has no loss of its own: give fit a loss=, or "
            "define the method `loss` of the class."
        )
