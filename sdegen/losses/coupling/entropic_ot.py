"""Entropic minibatch optimal transport, on the device, over all devices if need be."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ...typing import AxisName, PyTree, RandomKey, Scalar, is_traced, number
from ..per_sample import batch_index, draw_each, sample_keys
from .costs import check_points, cost_matrix, plans
from .pairs import End, Pairs
from .sinkhorn import potentials


class Plan(NamedTuple):
    """A plan, valid if `converged`; `error` is the mass that its rows misplace."""

    matrix: Float[Array, "n m"]
    error: Scalar
    converged: Bool[Array, ""]
    iterations: Int[Array, ""]
    regularisation: Scalar


class EntropicOT(eqx.Module):
    """For each x0 an x1 drawn from its row of the entropic plan.

    With regularisation 2 sigma^2 and a Brownian bridge of scale sigma between the ends
    it is the Schroedinger bridge of a batch (Tong et al. 2024, "Simulation-free
    Schroedinger bridges via score and flow matching", proposition 3.1). Plans of many
    points are better ones (Klein et al. 2025, "On fitting flow models with large
    Sinkhorn couplings"): by default there is one for the batch of all devices.

    **Arguments:**
    - `regularisation`: eps of (1) in `sdegen.losses.coupling.sinkhorn`, in (units of
      the data)^2; .05 of the mean cost of each plan by default.
    - `points`: rows in one plan; None, the default, for all.
    - `condition_weight`: w of `cost_matrix`; None pairs within a class.
    - `tolerance`: the mass of a plan that may be misplaced; 0.01.
    - `max_iterations`: of one plan; 1000.

    In `Pairs.aux`, "coupling_unsolved" is the share of plans that did not reach the
    tolerance and "coupling_error" the mass that they misplace on average. If a plan is
    not finite x1 is nan, which stops the training.
    """

    regularisation: Scalar | None = number(None)
    points: int | None = eqx.field(default=None, static=True)
    condition_weight: Scalar | None = number(None)
    tolerance: Scalar = number(1e-2)
    max_iterations: int = eqx.field(default=1000, static=True)

    def plan(
        self,
        x0: Float[Array, "n ..."],
        x1: Float[Array, "m ..."],
        cond0: PyTree = None,
        cond1: PyTree = None,
    ) -> Plan:
        """The plan between two whole sets of points; see `cost_matrix`."""
        cost = cost_matrix(x0, x1, cond0, cond1, self.condition_weight)
        eps = self._eps(x0, x1)
        solved = self._solve(cost, eps)
        logits = (solved.f[:, None] + solved.g - cost) / eps
        matrix = jnp.exp(logits) / cost.size
        return Plan(matrix, solved.error, solved.converged, solved.iterations, eps)

    def __call__(
        self,
        key: RandomKey,
        x0: End,
        x1: End,
        cond: PyTree = None,
        axis_name: AxisName | None = None,
    ) -> Pairs:
        """x0 as it is, with an x1 for each of its rows, drawn with replacement."""
        keys = sample_keys(key, batch_index(len(x0), axis_name)[0])
        u = draw_each(jax.random.uniform, keys, (), x0.dtype)
        weight = self.condition_weight
        if axis_name is not None and self.points is None:
            others, their_cond = jax.tree.map(
                lambda a: jax.lax.all_gather(a, axis_name, tiled=True), (x1, cond)
            )
            cost = cost_matrix(x0, others, cond, their_cond, weight, axis_name)[None]
            eps = jax.lax.pmean(self._eps(x0, others), axis_name)[None]
        else:
            others, axis_name = x1, None
            cost = plans(x0, x1, cond, self.points, weight)
            split = (a.reshape(*cost.shape[:2], *a.shape[1:]) for a in (x0, x1))
            eps = jax.vmap(self._eps)(*split)
        solved = jax.vmap(lambda c, e: self._solve(c, e, axis_name))(cost, eps)
        pick = jax.vmap(_draw)(u.reshape(len(cost), -1), solved, cost, eps)
        first = jnp.arange(0, len(others), cost.shape[-1])[:, None]
        x1 = others[(pick + first).reshape(-1)]
        x1 = jnp.where(jnp.isfinite(solved.error).all(), x1, jnp.nan)
        unsolved = 1 - jnp.mean(solved.converged.astype(x0.dtype))
        error = jnp.mean(solved.error)
        aux = {"coupling_unsolved": unsolved, "coupling_error": error}
        return Pairs(x0, x1, cond, aux)

    def _eps(self, x0, x1):
        if self.regularisation is not None:
            return self.regularisation.astype(x0.dtype)
        x, y = (a.reshape(len(a), -1) - jnp.mean(x1, 0).ravel() for a in (x0, x1))
        mean = jnp.mean(jnp.sum(x**2, 1)) + jnp.mean(jnp.sum(y**2, 1))
        # where all points are one any plan will do
        return jnp.maximum(0.05 * mean, jnp.finfo(x0.dtype).tiny)

    def _solve(self, cost, eps, axis_name=None):
        limits = {"tolerance": self.tolerance, "max_iterations": self.max_iterations}
        return potentials(cost, eps, **limits, axis_name=axis_name)

    def __check_init__(self):
        check_points(self.points)
        eps = self.regularisation
        if eps is not None and not is_traced(eps) and not bool((eps > 0).all()):
            raise ValueError(
                f"regularisation must be > 0, in (units of the data)^2, got "
                f"{float(eps):g}. For the exact matching take ExactOT()."
            )


def _draw(u, solved, cost, eps):
    """For each row the column at which its cumulative probability passes u."""
    share = jax.nn.softmax((solved.g - cost) / eps, axis=-1)
    passed = jnp.cumsum(share, axis=-1)
    below = passed < u[:, None] * passed[:, -1:]
    return jnp.minimum(jnp.sum(below, axis=-1), cost.shape[-1] - 1)
