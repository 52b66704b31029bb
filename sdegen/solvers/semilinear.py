"""The one term of the fast samplers: the flow and every reverse SDE, semilinear.

In the coordinates of `sample`, y = a x0 + tau z with a = 1 - tau, every path is the
rectified flow. The clock of this term is c = -log tau, which rises from noise to data,
is 0 where the data vanish, and holds both ends precisely in float32:

    tau = exp(-c),   a = -expm1(-c),   lambda = log(a / tau) = log(expm1(c))        (1)

lambda is half the log-SNR, h below its growth over a step, and

    1 - exp(-h) = -expm1(-(c1 - c0)) / a1                                          (2)

is precise for any step, also from a0 = 0, where h is infinite.

A *splitting* y' = L y + N p solves its linear part L exactly and sees the network only
through a prediction p, which is constant on some ideal data and therefore changes
slowly on real ones. With a scale E and a variable xi,

    d(y / E) = w(xi) p dxi                                                         (3)

    p           exact for          E                     xi                w
    x0          a point            tau                   lambda            exp(xi)
    eps         (large noise)      a                     lambda            -exp(-xi)
    velocity    a point, noise     1                     tau               1
    edm         N(0, sigma_data^2) hypot(tau, s a)       arctan(tau / s a) 1

(s is sigma_data). All of them are DDIM for the first order but edm's, which is Euler's
method in the angle xi: there data of standard deviation s have unit speed, as in the
preconditioning of Karras et al. 2022, table 1.

Where alpha and sigma are arrays, every coordinate has a clock of its own, and solvers
are handed both ends of a step in these local clocks: all of the above is elementwise.
The clock that Diffrax sees is their mean (`path`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..processes import prediction
from ..processes.brownian import GridBrownianPath, TreeBrownianPath
from ..processes.path import AbstractPath, NoiseInverse
from ..processes.prediction import Prediction
from ..typing import PyTree, Scalar, ScalarLike, float_array

Clock: TypeAlias = Float[Array, "..."]
"""The clock c: a scalar, or one for each coordinate of a sample."""
FLOOR = 1e-3  # a / tau below which lambda, an abscissa only, stops
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)


class Node(eqx.Module):
    """A point of the clock, with all that a step needs of it.

    `clock` is c, a scalar or one for each coordinate of a sample; `a` and `tau` are
    those of (1); `t` is the time of the path; `scale` is x / y, alpha + sigma. `known`
    is what the denoiser has prepared for this time, None off a fixed grid.
    """

    clock: Clock
    a: Clock
    tau: Clock
    t: Scalar
    scale: Clock
    known: PyTree = None

    @classmethod
    def at(cls, path: AbstractPath, t: ScalarLike, known: PyTree = None) -> "Node":
        """The node at the time t of a path."""
        t = float_array(t)
        alpha, sigma = path.scales(t)
        total = alpha + sigma
        clock = jnp.log1p(alpha / sigma)
        return cls(clock, alpha / total, sigma / total, t, total, known)

    @classmethod
    def of_clock(cls, inverse: NoiseInverse, c: Clock) -> "Node":
        """The node of a clock that the grid does not know: its time by the inverse.

        Of local clocks it takes the mean, as they must belong to one time.
        """
        c = jnp.mean(c)
        t = inverse(c)
        alpha, sigma = inverse.path.scales(t)
        c = jnp.log1p(alpha / sigma) if alpha.ndim else c
        return cls(c, -jnp.expm1(-c), jnp.exp(-c), t, alpha + sigma)

    @property
    def half_logsnr(self) -> Clock:
        """lambda, not below log(1e-3)."""
        return jnp.log(jnp.maximum(self.a / self.tau, FLOOR))


def decay(here: Node, there: Node) -> tuple[Clock, Clock]:
    """(exp(-h), 1 - exp(-h)) over a step, equation (2)."""
    step = here.clock - there.clock
    return here.a / there.a * jnp.exp(step), -jnp.expm1(step) / there.a


def root(v: Array) -> Array:
    """The square root of max(v, 0), with a finite derivative at 0."""
    positive = v > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, v, 1.0)), 0.0)


def kept(shrink: Clock, stochasticity: ScalarLike | None) -> Clock | float:
    """exp(-lambda^2 h) from exp(-h): the share of the old noise after a step."""
    if stochasticity is None:
        return 1.0
    power, positive = stochasticity**2, shrink > 0
    share = jnp.where(positive, shrink, 1.0) ** power
    return jnp.where(power > 0, jnp.where(positive, share, 0.0), 1.0)


class AbstractDriftTerm(dfx.AbstractTerm):
    """A term that is driven by time alone."""

    def contr(self, t0, t1, **kwargs):
        """The step."""
        return t1 - t0

    def prod(self, vf, control):
        """The increment."""
        return vf * control


class SemilinearTerm(AbstractDriftTerm):
    """The flow of a denoiser in the clock c, with what an exponential solver asks for.

    As a plain Diffrax term it is the probability flow dy/dc = tau (x0_hat - z_hat).
    `stochasticity` is the noise level of the reverse SDE, None for the flow; `brownian`
    drives it, None where nothing is drawn; `cell` is the step that is being taken, on
    the clock of the whole, and `row` what the solver has prepared for it, None off a
    fixed grid. y is (batch, ...).
    """

    denoiser: Any  # an AbstractDenoiser
    inverse: NoiseInverse
    cond: PyTree = None
    stochasticity: Scalar | None = None
    brownian: GridBrownianPath | TreeBrownianPath | None = None
    cell: tuple[Scalar, Scalar] | None = None
    row: PyTree = None

    def posterior_means(
        self, node: Node, y: Float[Array, "batch ..."]
    ) -> tuple[Float[Array, "batch ..."], Float[Array, "batch ..."]]:
        """(x0_hat, z_hat) at y and a node: one network evaluation."""
        x = node.scale * y
        if node.known is None:
            return self.denoiser.posterior_means(node.t, x, self.cond)
        return self.denoiser.means_from(node.known, x, self.cond)

    def node(self, c: Clock) -> Node:
        """The node at a clock that the grid does not know."""
        return Node.of_clock(self.inverse, c)

    def normal(self, draw: int = 0) -> Float[Array, "..."]:
        """A standard normal of the shape of y for the step, another for each `draw`."""
        (c0, c1), brownian = self.cell, self.brownian  # pyright: ignore[reportGeneralTypeIssues]
        if draw:
            fold = jax.vmap(lambda k: jax.random.fold_in(k, 2**31 - draw))
            brownian = eqx.tree_at(lambda b: b.keys, brownian, fold(brownian.keys))
        step = jnp.where(c1 > c0, c1 - c0, 1.0)
        return brownian.evaluate(c0, c1) / jnp.sqrt(step)  # pyright: ignore[reportOperatorIssue]

    def vf(self, t, y, args):
        """dy/dc of the probability flow."""
        node = self.node(t)
        x0, z = self.posterior_means(node, y)
        return node.tau * self.inverse.local_rate(t) * (x0 - z)


def ddim(
    node: Node, x0: Float[Array, "batch ..."], z: Float[Array, "batch ..."]
) -> Float[Array, "batch ..."]:
    """a x0 + tau z at a node: the step of DDIM, exact if neither mean changes."""
    return node.a * x0 + node.tau * z


@dataclass(frozen=True)
class Splitting:
    """A row of the table (3); every function takes (a, tau, s)."""

    scale: Callable
    variable: Callable
    value: Callable
    """(x0, z, a, tau, s) -> p."""
    density: Callable
    """w(xi)."""

    def linear(self, start, stop, y, x0, z, s, corrected):
        """y at `stop` if p stays; `corrected` where y is not a x0 + tau z."""
        here, there = (start.a, start.tau, s), (stop.a, stop.tau, s)
        if self is _SPLITTINGS[prediction.edm]:
            angle = self.variable(*there) - self.variable(*here)
            rise = angle * self.value(x0, z, *here)
            return self.scale(*there) * (y / self.scale(*here) + rise)
        if not corrected:
            return ddim(stop, x0, z)
        scale = self.scale(*here)
        ratio = jnp.where(scale > 0, self.scale(*there) / jnp.maximum(scale, 1e-30), 0)
        return ddim(stop, x0, z) + ratio * (y - ddim(start, x0, z))


def _lambda(a, tau, s):
    return jnp.log(jnp.maximum(a / tau, FLOOR))


def _angle(a, tau, s):
    return jnp.arctan2(tau, s * a)


def _edm(x0, z, a, tau, s):
    return (s * s * a * z - tau * x0) / (s * jnp.hypot(tau, s * a))


_SPLITTINGS = {
    prediction.x0: Splitting(
        lambda a, tau, s: tau, _lambda, lambda x0, z, a, tau, s: x0, jnp.exp
    ),
    prediction.eps: Splitting(
        lambda a, tau, s: a,
        _lambda,
        lambda x0, z, a, tau, s: z,
        lambda xi: -jnp.exp(-xi),
    ),
    prediction.velocity: Splitting(
        lambda a, tau, s: jnp.ones_like(a),
        lambda a, tau, s: tau,
        lambda x0, z, a, tau, s: z - x0,
        jnp.ones_like,
    ),
    prediction.edm: Splitting(
        lambda a, tau, s: jnp.hypot(tau, s * a), _angle, _edm, jnp.ones_like
    ),
}


def splitting(kind: Prediction) -> Splitting:
    """The splitting of a prediction kind."""
    if kind not in _SPLITTINGS:
        known = ", ".join(str(k) for k in _SPLITTINGS)
        raise ValueError(
            f"an exponential solver works in the prediction of one of {known}, got "
            f"{kind!r}. For example: prediction=sdegen.prediction.eps."
        )
    return _SPLITTINGS[kind]


def integrals(
    nodes: Float[Array, "nodes ..."],
    known: Int[Array, ""],
    start: Clock,
    stop: Clock,
    density: Callable,
) -> Float[Array, "nodes ..."]:
    """Weights W with sum_j W_j p_j = int w(xi) (P(xi) - p_0) dxi from start to stop.

    P is the polynomial through the first `known` values p_j at `nodes`, in Newton's
    form, of which the terms that are not known are left out; the weights sum to 0. The
    integrals are Gauss-Legendre's with 12 nodes: exact to rounding for the densities of
    (3) over any step that a sampler takes.
    """
    return jnp.sum(newton_terms(nodes, known, start, stop, density)[0], axis=0)


def newton_terms(
    nodes: Float[Array, "nodes ..."],
    known: Int[Array, ""],
    start: Clock,
    stop: Clock,
    density: Callable,
) -> tuple[Float[Array, "nodes nodes ..."], Clock]:
    """What each term of Newton's form adds to `integrals`, and int w(xi) dxi.

    The first term is constant and adds nothing, so that the sum of the first k terms
    are the weights of the first k nodes.
    """
    half, count = (stop - start) / 2, len(nodes)

    def wide(v):  # static numbers before the axes of the coordinates
        return jnp.asarray(v.reshape(v.shape + (1,) * half.ndim), half.dtype)

    xi = (start + stop) / 2 + half * wide(_NODES)
    w, newton = density(xi) * half * wide(_WEIGHTS), [xi - nodes[0]]
    none = jnp.zeros_like(nodes)[None]
    if count == 1:
        return none, jnp.sum(w, axis=0)
    for m in range(1, count - 1):
        newton.append(newton[-1] * (xi - nodes[m]))
    moments = jnp.sum(w * jnp.stack(newton), axis=1)  # of the terms 1, 2, ...
    # All of Newton's divided differences at once: term m takes the nodes up to m.
    term = np.arange(1, count)[:, None, None]
    j, l = np.arange(count)[:, None], np.arange(count)
    used = jnp.arange(1, count) < known
    used = used.reshape(used.shape + (1,) * nodes.ndim)
    gaps = nodes[:, None] - nodes[None]
    counts = wide((l <= term) & (l != j) & (j <= term)) > 0
    counts &= used[:, :, None] & (gaps != 0)  # guards what is not known yet
    divided = 1 / jnp.prod(jnp.where(counts, gaps, 1.0), axis=2)
    share = jnp.where(used & (wide((j <= term)[..., 0]) > 0), divided, 0.0)
    return jnp.concatenate([none, moments[:, None] * share]), jnp.sum(w, axis=0)
