"""Adams methods of a splitting: one network evaluation a step, older ones for order.

With the last predictions p_0 (here), p_1, ..., at xi_0, xi_1, ..., equation (3) of
`semilinear` is integrated with the polynomial through them in place of p:

    y(c1) = L + E(c1) sum_j W_j p_j,      W from `semilinear.integrals`              (1)

where L is the step with p constant. A corrector repeats the step when the prediction at
its end is known, with that one among the nodes; the network is not called again. The
first steps have fewer predictions and a lower order.

Where a grid has few steps the polynomial is no help: its order falls until the step is
short enough for it (`_LONGEST`), its weights are not large, and the scale E changes by
no more than a factor of two. The limits were found on one mixture, on three paths and
three grids of 1 to 10 steps, as those with which no method is far behind DDIM (see
experiments/LOG.md). Learned weights know their grid, and adaptive steps their error:
both keep the order.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..processes.prediction import Prediction, eps
from ..typing import Scalar, float_array
from .semilinear import FLOOR, Node, integrals, newton_terms, splitting
from .solver import AbstractSemilinearSolver, whole

# Of n nodes, n = 1, 2, ..., for a predictor and a corrector: the longest step, as an
# angle arctan(tau / (s a)), and the largest sum of |W_j| over the weight of constant p.
_LONGEST = np.array([[9, 0.42, 0.34, 0.26, 0.22], [9, 0.36, 0.32, 0.24, 0.2]])
_LARGEST = np.array([[9, 2, 4, 8, 14], [9, 1.5, 3, 5, 9]])
_SHORT = 0.03  # below this angle the weights may be as they are
_FACTOR = 2.0


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
    """This step of lambda over the one before, 0 where that has no use."""
    before = here.half_logsnr - history.nodes[0]
    known = (history.step > 0) & (before > 0)
    rise = there.half_logsnr - here.half_logsnr
    ratio = rise / jnp.where(known, before, 1)
    turn = jnp.arctan2(here.tau, 0.5 * here.a) - jnp.arctan2(there.tau, 0.5 * there.a)
    fine = (ratio <= _LARGEST[0, 1]) & (here.tau <= _FACTOR * there.tau)
    fine = (turn <= _LONGEST[0, 1]) & (fine | (turn <= _SHORT))
    return jnp.where(known & fine, ratio, 0)


def after(history: History, value, here: Node) -> History:
    """The history of the one prediction `value`, at `here` in lambda."""
    return History(history.step + 1, (value,), here.half_logsnr[None], None)


class AbstractAdams(AbstractSemilinearSolver):
    """What Adams methods share.

    `points` is the order of the predictor, 1 to 4, `corrector` that of the corrector, 0
    for none, by None one more; `prediction` and `sigma_data` are those of the
    splitting; `weights` were learned, for one number of steps, or are None.
    """

    points: int = eqx.field(static=True)
    corrector: int = eqx.field(static=True)
    prediction: Prediction = eqx.field(static=True)
    sigma_data: Scalar
    weights: Weights | None

    def __init__(self, points, corrector, prediction, sigma_data, weights=None):
        self.points = whole(f"the order of {type(self).__name__}", points, 1, 4)
        self.corrector = points + 1 if corrector is None else corrector
        splitting(prediction)
        self.prediction = prediction
        self.sigma_data, self.weights = float_array(sigma_data), weights

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
        rule, size = splitting(self.prediction), self.sigma_data.astype(nodes.a.dtype)
        place = (nodes.a, nodes.tau, size)
        xi, scale = rule.variable(*place), jnp.maximum(rule.scale(*place), 1e-30)
        fold, turn = (
            jnp.max(jnp.abs(jnp.diff(v, axis=0)).reshape(len(xi) - 1, -1), axis=1)
            for v in (jnp.log(scale), jnp.arctan2(nodes.tau, size * nodes.a))
        )
        step, start, stop = jnp.arange(len(xi) - 1), xi[:-1], xi[1:]
        orders = np.array([n for n in (self.points, self.corrector) if n])
        # How many steps before the start each node is; a corrector knows the end, too.
        back = np.arange(orders.max())
        back = np.stack([back, np.r_[0, -1, back[1:-1]][: len(back)]][: len(orders)])
        known = jnp.minimum(step[:, None] + 1 + np.arange(len(orders)), orders)
        places = jnp.maximum(step[:, None, None] - back, 0)

        limits = jnp.stack([_LONGEST, _LARGEST], 1)[: len(orders), :, : len(back[0])]

        def weigh(args):
            places, known, start, stop, turn, fold = args

            def one(nodes, most, limits):
                if self.weights is not None:
                    return integrals(xi[nodes], most, start, stop, rule.density), most
                terms, unit = newton_terms(xi[nodes], most, start, stop, rule.density)
                count, (longest, largest) = jnp.arange(1, len(nodes) + 1), limits
                found = jnp.cumsum(terms, axis=0)  # the weights of 1, 2, ... nodes
                share = jnp.sum(jnp.abs(found), axis=1) / jnp.abs(unit)
                share = jnp.max(share.reshape(len(count), -1), axis=1)
                fine = (turn <= longest) & (fold <= np.log(_FACTOR))
                fine &= (share <= largest) | (turn <= _SHORT)
                k = jnp.max(jnp.where(fine & (count <= most), count, 1))
                return found[k - 1], k

            return jax.vmap(one)(places, known, limits)

        # One step at a time: smaller to compile, and small where coordinates have own.
        each = (places, known, start, stop, turn, fold)
        weights, known = jax.lax.map(weigh, each)
        learned = jax.tree.leaves(self.weights) or (None, None)
        combine = jax.vmap(self._combination)
        ahead, *behind = (
            combine(weights[:, i, :n], known[:, i], start, stop, learned[i])
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

    def _combination(self, weights, known, start, stop, learned) -> Combination:
        """The weights of a step, with its row of what is learned."""
        if learned is not None:
            # About int w(xi) dxi over the step, the weight of a constant p.
            density = splitting(self.prediction).density
            unit = (stop - start) * density((start + stop) / 2)
            used = jnp.where(jnp.arange(len(weights)) < known, learned, 0)
            learned = unit * used.reshape(used.shape + (1,) * unit.ndim)
        return Combination(weights, learned)

    def _weigh(self, nodes, known, start, stop, learned) -> Combination:
        """The weights of the `known` first of `nodes`, for one step."""
        density = splitting(self.prediction).density
        weights = integrals(nodes, known, start, stop, density)
        return self._combination(weights, known, start, stop, learned)

    def _usable(self, step, start):
        """Whether the step that led here can be corrected."""
        if self.prediction is eps:
            # A step from alpha = 0 has no corrector: its weights are infinite.
            return (step > 0) & (start > np.log(FLOOR) + 1e-3)
        return step > 0

    def advance(self, term, here, there, y, state):
        """One evaluation: correct y, if there is a corrector, then predict."""
        means = term.posterior_means(here, y)
        if self.corrector:
            y = self.correct(term.row, here, y, means, state)
        y1, state = self.predict(term.row, here, there, y, means, state)
        return y1, None, state

    def predict(
        self, row: Row | None, here: Node, there: Node, y, means, history: History
    ) -> tuple[Float[Array, "batch ..."], History]:
        """(y there, the history from there) by (1) with at most `points` nodes."""
        rule, s = splitting(self.prediction), self.sigma_data.astype(y.dtype)
        start, stop = (here.a, here.tau, s), (there.a, there.tau, s)
        values, step, nodes = (rule.value(*means, *start), *history.values), None, None
        length, corrects = len(history.values), history.linear is not None
        linear = y1 = rule.linear(here, there, y, *means, s, corrects)
        if row is None:
            node, step = rule.variable(*start), history.step + 1
            nodes = jnp.concatenate([node[None], history.nodes])
        if self.points > 1 or self.weights is not None:
            if row is None:
                known, used = jnp.minimum(step, self.points), nodes[: self.points]
                learned = self.weights and self.weights.predictor[history.step]
                change = self._weigh(used, known, node, rule.variable(*stop), learned)
            else:
                change = row.predictor
            y1 = linear + rule.scale(*stop) * change(values[: self.points])
        nodes = None if nodes is None else nodes[:length]
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
            known = jnp.minimum(history.step + 1, self.corrector)
            last = jnp.maximum(history.step - 1, 0)
            learned = self.weights and self.weights.corrector[last]
            change = self._weigh(nodes, known, start, node, learned)
            usable = self._usable(history.step, start)
        else:
            change, usable = row.corrector, row.usable
        better = history.linear + rule.scale(*place) * change(values)
        return jnp.where(usable, better, y)
