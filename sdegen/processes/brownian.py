"""Brownian paths with one key per sample, and the term that multiplies them by g.

Sample i draws the same numbers in any batch and on any mesh. On a fixed grid every step
has its own draws; adaptive steps need Diffrax's Brownian tree.
"""

from collections.abc import Callable

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


class NoiseTerm(dfx.AbstractTerm):
    """g(t, y) dW.

    **Arguments:**
    - `g`: a function of (t, y, args) that returns what broadcasts against y.
    - `path`: the Brownian path W.
    """

    g: Callable
    path: dfx.AbstractBrownianPath

    def vf(self, t, y, args):
        """g(t, y)."""
        return self.g(t, y, args)

    def contr(self, t0, t1, **kwargs):
        """The Brownian increment over [t0, t1]."""
        return self.path.evaluate(t0, t1, **kwargs)

    def prod(self, vf, control):
        """g dW."""
        return vf * control


class GridBrownianPath(dfx.AbstractBrownianPath):
    """Brownian increments over the cells of a fixed grid, which are never divided.

    **Arguments:**
    - `ts`: the times of the grid, rising, (times,).
    - `keys`: one key per sample, (batch,).
    - `shape`: of one sample.
    - `levy_area`: `diffrax.BrownianIncrement` or `diffrax.SpaceTimeLevyArea`.
    """

    ts: Float[Array, " times"]
    keys: Key[Array, " batch"]
    shape: tuple[int, ...] = eqx.field(static=True)
    levy_area: type = eqx.field(static=True)

    @property
    def t0(self):
        """The start of the grid."""
        return self.ts[0]

    @property
    def t1(self):
        """The end of the grid."""
        return self.ts[-1]

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        """The increment over the cell [t0, t1]."""
        cell = jnp.sum(self.ts[1:-1] <= t0)
        dt = (t1 - t0).astype(self.ts.dtype)  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue]

        def draw(key):
            key = jax.random.fold_in(key, cell)
            if self.levy_area is dfx.BrownianIncrement:
                return jax.random.normal(key, self.shape, dt.dtype), None
            keys = jax.random.split(key)
            return tuple(jax.random.normal(k, self.shape, dt.dtype) for k in keys)

        w, h = jax.vmap(draw)(self.keys)
        w = jnp.sqrt(dt) * w
        if not use_levy:
            return w
        if h is None:
            return dfx.BrownianIncrement(dt=dt, W=w)
        return dfx.SpaceTimeLevyArea(dt=dt, W=w, H=jnp.sqrt(dt / 12) * h)


class TreeBrownianPath(dfx.AbstractBrownianPath):
    """One `diffrax.VirtualBrownianTree` per sample: the same path at every step size.

    **Arguments:**
    - `t0`, `t1`: the first and the last time.
    - `tol`: the length of time down to which the path is resolved.
    - `keys`, `shape`, `levy_area`: as in `GridBrownianPath`.
    """

    t0: Float[Array, ""]
    t1: Float[Array, ""]
    tol: Float[Array, ""]
    keys: Key[Array, " batch"]
    shape: tuple[int, ...] = eqx.field(static=True)
    levy_area: type = eqx.field(static=True)

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        """The increment over [t0, t1]."""
        times = self.t0, self.t1, self.tol
        shape = jax.ShapeDtypeStruct(self.shape, self.t0.dtype)

        def one(key):
            tree = dfx.VirtualBrownianTree(*times, shape, key, self.levy_area)
            return tree.evaluate(t0, t1, use_levy=use_levy)

        if not use_levy:
            return jax.vmap(one)(self.keys)
        levy = jax.eval_shape(one, self.keys[0])
        axes = eqx.tree_at(lambda v: v.dt, jax.tree.map(lambda _: 0, levy), None)
        return jax.vmap(one, out_axes=axes)(self.keys)
