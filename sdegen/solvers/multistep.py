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
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..processes.prediction import Prediction, eps
from ..typing import Scalar
from .semilinear import FLOOR, Node, integrals, splitting
from .solver import AbstractSemilinearSolver


class Weights(eqx.Module):
    """What is added to the weights of each step, in units of the weight of constant p.

    One row per step of the grid that they were learned for, one column per node.
    """

    predictor: Float[Array, "steps order"]
    corrector: Float[Array, "steps nodes"]


class Combination(NamedTuple):
    """sum_j W_j (p_j - p_0), and what is learned: sum_j C_j p_j."""

    weights: Float[Array, "nodes ..."]
    learned: Float[Array, "nodes ..."] | None

    def __call__(self, values):
        """The sum for the predictions p_j, whose weights of (1) sum to 0."""
        total = jnp.zeros_like(values[0])
        for w, p in zip(self.weights[1:], values[1:], strict=True):
            total = total + w * (p - values[0])
        if self.learned is not None:
            for w, p in zip(self.learned, values, strict=True):
                total = total + w * p
        return total


class Row(NamedTuple):
    """The weights of the step from a node, and of the corrector of the step to it."""

    predictor: Combination
    corrector: Combination | None
    usable: Array | None
    """Whether the step to it can be corrected."""


class History(NamedTuple):
    """Predictions of earlier steps, the newest first, and the step that led here.

    With rows neither the number of the step nor the older nodes are needed: None.
    """

    step: Int[Array, ""] | None
    values: tuple[Float[Array, "batch ..."], ...]
    nodes: Float[Array, "length ..."] | None
    linear: Float[Array, "batch ..."] | None
    """L of the last step, which a corrector starts from; None without one."""


def empty(length: int, y: Float[Array, "batch ..."], node: Node) -> History:
    """A history of `length` predictions, none of them known yet."""
    nodes = jnp.zeros((length, *node.a.shape), node.a.dtype)
    zeros = (jnp.zeros_like(y),) * length
    return History(jnp.zeros((), jnp.int32), zeros, nodes, None)


def growth(history: History, here: Node, there: Node) -> Array:
    """This step of lambda over the one before, 0 where there is none."""
    before = here.half_logsnr - history.nodes[0]
    known = (history.step > 0) & (before > 0)
    rise = there.half_logsnr - here.half_logsnr
    return jnp.where(known, rise / jnp.where(known, before, 1), 0)


def after(history: History, value, here: Node) -> History:
    """The history of the one prediction `value`, at `here` in lambda."""
    return History(history.step + 1, (value,), here.half_logsnr[None], None)


class AbstractAdams(AbstractSemilinearSolver):
    """What Adams methods share.

    `points` is the order of the predictor, `corrector` that of the corrector, 0 for
    none; `prediction` and `sigma_data` are those of the splitting; `weights` were
    learned, for one number of steps, or are None.
    """

    points: eqx.AbstractVar[int]
    corrector: eqx.AbstractVar[int]
    prediction: eqx.AbstractVar[Prediction]
    sigma_data: eqx.AbstractVar[Scalar]
    weights: eqx.AbstractVar[Weights | None]

    @property
    def steps(self):
        """The number of steps that learned weights are for, None for any."""
        return None if self.weights is None else len(self.weights.predictor)

    def order(self, terms):
        """The order of convergence."""
        return min(self.corrector, self.points + 1) if self.corrector else self.points

    def start(self, term, here, there, y):
        """No prediction is known."""
        length = max(self.points, self.corrector) - 1
        linear = jnp.zeros_like(y) if self.corrector else None
        history = empty(length, y, here)._replace(linear=linear)
        return history if term.row is None else history._replace(step=None, nodes=None)

    def rows(self, nodes: Node) -> Row:
        """The weights of every step of a grid, those of both methods at once."""
        rule, dtype = splitting(self.prediction), nodes.a.dtype
        xi = rule.variable(nodes.a, nodes.tau, self.sigma_data.astype(dtype))
        step, start, stop = jnp.arange(len(xi) - 1), xi[:-1], xi[1:]
        orders = np.array([n for n in (self.points, self.corrector) if n])
        # How many steps before the start each node is; a corrector knows the end, too.
        back = np.arange(orders.max())
        back = np.stack([back, np.r_[0, -1, back[1:-1]][: len(back)]][: len(orders)])
        known = jnp.minimum(step[:, None] + 1 + np.arange(len(orders)), orders)
        places = jnp.maximum(step[:, None, None] - back, 0)

        def weigh(args):
            places, known, start, stop = args
            one = lambda n, k: integrals(xi[n], k, start, stop, rule.density)  # noqa: E731
            return jax.vmap(one)(places, known)

        # Of one step at a time where every coordinate has its own: that takes memory.
        many = jax.lax.map if xi.ndim > 1 else lambda f, xs: jax.vmap(f)(xs)
        weights = many(weigh, (places, known, start, stop))
        unit = self._unit(start, stop)
        learned = (None, None)
        if self.weights is not None:
            learned = (self.weights.predictor, self.weights.corrector)
        ahead, *behind = (
            jax.vmap(self._combination)(
                weights[:, i, :n], known[:, i], unit, learned[i]
            )
            for i, n in enumerate(orders)
        )
        ahead = jax.tree.map(lambda a: jnp.concatenate([a, a[-1:]]), ahead)
        if not behind:
            return Row(ahead, None, None)
        usable = self._usable(step + 1, start)
        return Row(
            ahead,
            jax.tree.map(lambda a: jnp.concatenate([a[:1], a]), behind[0]),
            jnp.concatenate([jnp.zeros((1,), bool), usable]),
        )

    def _unit(self, start, stop):
        """About int w(xi) dxi over a step, the weight of a constant p."""
        density = splitting(self.prediction).density
        return (stop - start) * density((start + stop) / 2)

    def _combination(self, weights, known, unit, learned) -> Combination:
        """The weights of a step, with its row of what is learned."""
        if learned is not None:
            used = jnp.where(jnp.arange(len(weights)) < known, learned, 0)
            learned = unit * used.reshape(used.shape + (1,) * unit.ndim)
        return Combination(weights, learned)

    def _weigh(self, nodes, known, start, stop, learned) -> Combination:
        """The weights of the `known` first of `nodes`, for one step."""
        density = splitting(self.prediction).density
        weights, unit = integrals(nodes, known, start, stop, density), None
        if learned is not None:
            unit = self._unit(start, stop)
        return self._combination(weights, known, unit, learned)

    def _usable(self, step, start):
        """Whether the step that led here can be corrected."""
        if self.prediction is eps:
            # A step from alpha = 0 has no corrector: its weights are infinite.
            return (step > 0) & (start > np.log(FLOOR) + 1e-3)
        return step > 0

    def predict(
        self, row: Row | None, here: Node, there: Node, y, means, history: History
    ) -> tuple[Float[Array, "batch ..."], History]:
        """(y there, the history from there) by (1) with at most `points` nodes."""
        rule, s = splitting(self.prediction), self.sigma_data.astype(y.dtype)
        start, stop = (here.a, here.tau, s), (there.a, there.tau, s)
        values, step, nodes = (rule.value(*means, *start), *history.values), None, None
        length = len(history.values)
        if row is None:
            node, step = rule.variable(*start), history.step + 1
            nodes = jnp.concatenate([node[None], history.nodes])
        corrects = history.linear is not None
        y1 = linear = rule.linear(here, there, y, *means, s, corrects)
        if self.points > 1 or self.weights is not None:
            if row is None:
                known = jnp.minimum(step, self.points)
                end, learned = rule.variable(*stop), None
                if self.weights is not None:
                    learned = self.weights.predictor[history.step]
                used = nodes[: self.points]
                change = self._weigh(used, known, node, end, learned)
            else:
                change = row.predictor
            y1 = linear + rule.scale(*stop) * change(values[: self.points])
        if row is None:
            nodes = nodes[:length]
        return y1, History(step, values[:length], nodes, linear if corrects else None)

    def correct(
        self, row: Row | None, here: Node, y, means, history: History
    ) -> Float[Array, "batch ..."]:
        """y here, now that the prediction is known, with at most `corrector` nodes.

        `history` is that after the step to here; before the first step y stays as it
        is.
        """
        rule, s = splitting(self.prediction), self.sigma_data.astype(y.dtype)
        place, older = (here.a, here.tau, s), slice(1, self.corrector - 1)
        value = rule.value(*means, *place)
        values = (history.values[0], value, *history.values[older])
        if row is None:
            start, node = history.nodes[0], rule.variable(*place)
            nodes = jnp.concatenate([jnp.stack([start, node]), history.nodes[older]])
            known, learned = jnp.minimum(history.step + 1, self.corrector), None
            if self.weights is not None:
                learned = self.weights.corrector[jnp.maximum(history.step - 1, 0)]
            change = self._weigh(nodes, known, start, node, learned)
            usable = self._usable(history.step, start)
        else:
            change, usable = row.corrector, row.usable
        better = history.linear + rule.scale(*place) * change(values)
        return jnp.where(usable, better, y)
