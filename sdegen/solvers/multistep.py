"""Adams methods of a splitting: one network evaluation a step, older ones for order.

With the last predictions p_0 (here), p_1, ..., at xi_0, xi_1, ..., equation (3) of
`semilinear` is integrated with the polynomial through them in place of p:

    y(c1) = L + E(c1) sum_j W_j p_j,      W from `semilinear.integrals`              (1)

where L is the step with p constant. A corrector repeats the step when the prediction at
its end is known, with that one among the nodes; the network is not called again. The
first steps have fewer predictions and a lower order.
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..processes.prediction import Prediction, eps
from ..typing import Scalar
from .semilinear import FLOOR, Node, integrals, splitting


class Weights(eqx.Module):
    """What is added to the weights of each step, in units of the weight of constant p.

    One row per step of the grid that they were learned for, one column per node.
    """

    predictor: Float[Array, "steps order"]
    corrector: Float[Array, "steps nodes"]


class History(NamedTuple):
    """Predictions of earlier steps, the newest first, and the step that led here."""

    step: Int[Array, ""]
    values: tuple[Float[Array, "batch ..."], ...]
    nodes: Float[Array, "length ..."]
    linear: Float[Array, "batch ..."] | None
    """L of the last step, which a corrector starts from; None without one."""


def empty(
    length: int, y: Float[Array, "batch ..."], node: Node, corrects: bool
) -> History:
    """A history of `length` predictions, none of them known yet."""
    zero, nodes = jnp.zeros_like(y), jnp.zeros((length, *node.a.shape), node.a.dtype)
    step = jnp.zeros((), jnp.int32)
    return History(step, (zero,) * length, nodes, zero if corrects else None)


def combine(weights, values, learned=None, unit=None):
    """sum_j W_j p_j by differences from p_0, since the weights of (1) sum to 0."""
    total = jnp.zeros_like(values[0])
    for w, p in zip(weights[1:], values[1:], strict=True):
        total = total + w * (p - values[0])
    if learned is not None:
        for w, p in zip(learned, values, strict=True):
            total = total + unit * w * p
    return total


def _unit(rule, start, stop):
    """About int w(xi) dxi over the step, the weight of a constant p."""
    return (stop - start) * rule.density((start + stop) / 2)


def predict(
    prediction: Prediction,
    sigma_data: Scalar,
    order: int,
    here: Node,
    there: Node,
    y,
    means,
    history: History,
    learned: Float[Array, "steps order"] | None = None,
) -> tuple[Float[Array, "batch ..."], History]:
    """(y there, the history from there) by (1) with at most `order` nodes."""
    rule, s = splitting(prediction), sigma_data.astype(y.dtype)
    start, stop = (here.a, here.tau, s), (there.a, there.tau, s)
    value, node = rule.value(*means, *start), rule.variable(*start)
    values = (value, *history.values)
    nodes = jnp.concatenate([node[None], history.nodes])
    corrects = history.linear is not None
    linear = rule.linear(here, there, y, *means, s, corrects)
    y1 = linear
    if order > 1 or learned is not None:
        known = jnp.minimum(history.step + 1, order)
        end, scale = rule.variable(*stop), rule.scale(*stop)
        weights = integrals(nodes[:order], known, node, end, rule.density)
        if learned is not None:
            learned = jnp.where(jnp.arange(order) < known, learned[history.step], 0)
        unit = _unit(rule, node, end)
        y1 = linear + scale * combine(weights, values[:order], learned, unit)
    length = len(history.values)
    return y1, History(
        history.step + 1,
        values[:length],
        nodes[:length],
        linear if corrects else None,
    )


def correct(
    prediction: Prediction,
    sigma_data: Scalar,
    order: int,
    here: Node,
    y,
    means,
    history: History,
    learned: Float[Array, "steps nodes"] | None = None,
) -> Float[Array, "batch ..."]:
    """y here, now that the prediction is known, with at most `order` nodes.

    `history` is that after the step to here; before the first step y stays as it is.
    """
    rule, s = splitting(prediction), sigma_data.astype(y.dtype)
    place = (here.a, here.tau, s)
    value, node = rule.value(*means, *place), rule.variable(*place)
    start, older = history.nodes[0], slice(1, order - 1)
    values = (history.values[0], value, *history.values[older])
    nodes = jnp.concatenate([jnp.stack([start, node]), history.nodes[older]])
    known = jnp.minimum(history.step + 1, order)
    weights = integrals(nodes, known, start, node, rule.density)
    if learned is not None:
        row = learned[jnp.maximum(history.step - 1, 0)]
        learned = jnp.where(jnp.arange(order) < known, row, 0)
    change = combine(weights, values, learned, _unit(rule, start, node))
    better = history.linear + rule.scale(*place) * change
    # In eps a step from alpha = 0 has no corrector: its weights are infinite.
    usable = history.step > 0
    if prediction is eps:
        usable &= start > np.log(FLOOR) + 1e-3
    return jnp.where(usable, better, y)
