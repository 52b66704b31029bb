"""What every solver of the semilinear term shares."""

import abc
import dataclasses

import diffrax as dfx
from jaxtyping import Array, Int

from ..typing import PyTree
from .semilinear import Node, SemilinearTerm


class AbstractSemilinearSolver(dfx.AbstractItoSolver):
    """A Diffrax solver of a `SemilinearTerm`, on its rising clock.

    A solver writes `advance`, and `start` if it has a state; they are given the nodes
    `here` and `there` at both ends of a step. On a fixed grid Diffrax's `args` are two
    rows of a table that was made outside of the loop, each a node and what `rows` has
    for it (`term.row`); else the nodes are found from the clock.

    `points`: the order of convergence of the flow; 1. `family`: the largest
    stochasticity of the reverse SDE that it follows; 0, the flow alone. `draws`:
    whether it adds noise even to the flow; no. `calls`: network evaluations of a step;
    1. `calls_first`: before the first; 0.
    """

    term_structure = SemilinearTerm
    interpolation_cls = dfx.LocalLinearInterpolation

    points = 1
    family = 0.0
    draws = False
    calls = 1
    calls_first = 0

    def start(self, term, here, there, y) -> PyTree:
        """The state before the first step; none."""
        return None

    def order(self, terms):
        """The order of convergence of the flow."""
        return self.points

    def strong_order(self, terms):
        """The strong order for the additive noise of the reverse SDE."""
        return 1

    @abc.abstractmethod
    def advance(
        self, term: SemilinearTerm, here: Node, there: Node, y, state
    ) -> tuple[Array, Array | None, PyTree]:  # pyright: ignore[reportReturnType]
        """(y there, an error estimate or None, the state there) from y here."""

    def rows(self, nodes: Node) -> PyTree:
        """What a step needs besides its nodes, for all nodes of a fixed grid at once.

        A pytree with their leading axis, whose row i is for the step from node i; None.
        """
        return None

    @property
    def steps(self) -> int | None:
        """The number of steps that it is made for, None for any."""
        return None

    def evaluations(self, steps: Int[Array, ""]) -> Int[Array, ""]:
        """Network evaluations in `steps` attempted steps."""
        return self.calls * steps + self.calls_first

    def init(self, terms, t0, t1, y0, args):
        """The state before the first step."""
        return self.start(*_placed(terms, t0, t1, args), y0)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step, as Diffrax asks for it."""
        placed = _placed(terms, t0, t1, args)
        y1, error, state = self.advance(*placed, y0, solver_state)
        return y1, error, {"y0": y0, "y1": y1}, state, dfx.RESULTS.successful

    def func(self, terms, t0, y0, args):
        """The right-hand side of the flow."""
        return terms.vf(t0, y0, args)


def unwrapped(terms):
    """The term, which Diffrax wraps for the direction of time."""
    return terms.term if hasattr(terms, "direction") else terms


def _placed(terms, t0, t1, args) -> tuple[SemilinearTerm, Node, Node]:
    """The term of the step from t0 to t1, and the nodes at both ends."""
    term = unwrapped(terms)
    if args is None:
        here, there, row = term.node(t0), term.node(t1), None
    else:
        (here, row), (there, _) = args
    return dataclasses.replace(term, cell=(t0, t1), row=row), here, there


def whole(name: str, value, low: int, high: int) -> int:
    """`value` if it is a whole number from `low` to `high`."""
    if not (isinstance(value, int) and low <= value <= high):
        raise ValueError(
            f"{name} is a whole number from {low} to {high}, got {value!r}."
        )
    return value
