"""Couplings: which end of a path goes with which.

A coupling is a function `(key, x0, x1) -> (x0, x1)` on batches of data and of draws
from the other end. It keeps the distribution of each, so it trains a correct flow,
dx/dt = E[velocity given x_t] (Lipman et al. 2023, "Flow matching", theorem 2; Tong et
al. 2024, "Improving and generalizing flow-based generative models with minibatch
optimal transport"). Only with the independent coupling is z_hat the score. A coupling
may have two more parameters:

    cond        the conditions of the rows of x0, or None
    axis_name   the mapped axis, where the batch is one device's part

It chooses an x1 for each row of x0, or returns `Pairs` with the conditions moved alike.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from jaxtyping import Array, Float

from ...typing import AxisName, PyTree, RandomKey, Scalar

End: TypeAlias = Float[Array, "batch ..."]


class Pairs(NamedTuple):
    """What a coupling has paired: row i of each belongs together.

    `aux` holds scalars that training records. One whose name ends in "_unsolved" is the
    share of plans that were not solved: `fit` warns when it is not 0.
    """

    x0: End
    x1: End
    cond: PyTree = None
    aux: Mapping[str, Scalar] = {}


class PairedData(NamedTuple):
    """The other ends of given pairs, passed as conditions: see `paired`.

    Row i of `x1`, (n, ...), belongs to row i of the data; `cond` holds conditions.
    """

    x1: Float[Array, "n ..."]
    cond: PyTree = None


def independent(key: RandomKey, x0: End, x1: End) -> tuple[End, End]:
    """The pairs as they were drawn, independently."""
    return x0, x1


def paired(key: RandomKey, x0: End, x1: End, cond: PyTree) -> Pairs:
    """The pairs that were given, by `fit(..., cond=PairedData(x1, labels))`.

    For reflow (Liu et al. 2023, "Flow straight and fast"), bridges by Markovian fitting
    and data that come in pairs. The x1 drawn by the loss is not used.
    """
    if not isinstance(cond, PairedData):
        raise ValueError(
            "coupling.paired needs the other ends of the data: pass cond=coupling."
            "PairedData(x1), with a row for each row of the data, got "
            f"{type(cond).__name__}."
        )
    return Pairs(x0, cond.x1, cond.cond)


def couple(
    coupling: Callable,
    key: RandomKey,
    x0: End,
    x1: Float[Array, "others ..."],
    cond: PyTree = None,
    *,
    axis_name: AxisName | None = None,
) -> Pairs:
    """The pairs of a coupling, checked.

    **Arguments:**
    - `coupling`: a function as described above.
    - `key`: the key of its draws.
    - `x0`, `x1`: the ends, (batch, ...).
    - `cond`, `axis_name`: see above; None by default.

    **Raises:** ValueError for ends of other shapes, and for a coupling that moves the
    rows of x0 without their conditions.
    """
    name = getattr(coupling, "__name__", type(coupling).__name__)
    if x0.shape != x1.shape:
        raise ValueError(
            f"a coupling pairs two batches of one shape, got x0 of shape {x0.shape} "
            f"and x1 of shape {x1.shape}. Both ends need as many samples, of one shape."
        )
    asked = inspect.signature(coupling).parameters
    extras = {"cond": cond, "axis_name": axis_name}
    out = coupling(key, x0, x1, **{k: extras[k] for k in extras if k in asked})
    if not isinstance(out, Pairs):
        if not isinstance(out, tuple) or len(out) != 2:
            raise ValueError(
                f"the coupling {name} must return (x0, x1), or Pairs, got "
                f"{type(out).__name__}."
            )
        if cond is not None and out[0] is not x0:
            raise ValueError(
                f"the coupling {name} drops the labels: it returned other rows of x0 "
                "without their conditions. Return x0 as it came, or take `cond` as a "
                "parameter and return coupling.Pairs(x0, x1, cond), all moved alike."
            )
        out = Pairs(*out, cond)
    for end, before in ((out.x0, x0), (out.x1, x1)):
        if end.shape != before.shape:
            raise ValueError(
                f"the coupling {name} must keep the shape of both ends, "
                f"{before.shape}, got {end.shape}."
            )
    return out


Loss: TypeAlias = Scalar | tuple[Scalar, dict[str, Scalar]]
"""What a loss returns: a value, or with a coupling that has `aux` (value, aux)."""


def with_aux(value: Scalar, aux: Mapping[str, Scalar]) -> Loss:
    """A loss with the `aux` of its coupling, or alone if there is none."""
    return (value, dict(aux)) if aux else value


def split_aux(value: Loss) -> tuple[Scalar, dict[str, Scalar]]:
    """(value, aux) of what a loss returned."""
    return value if isinstance(value, tuple) else (value, {})
