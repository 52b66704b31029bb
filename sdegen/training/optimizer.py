"""Optimisers from Optax as modules: their numbers are arrays, so no value retraces.

Lion's update is a sign, so every coordinate moves by the full learning rate: take it 3
to 10 times smaller than AdamW's, the weight decay as much larger, and batches of 64 or
more (Chen et al. 2023, "Symbolic discovery of optimization algorithms", section 5). Its
state is one moment per parameter, half of AdamW's.
"""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ..typing import PyTree, Scalar, number


def matrices(params: PyTree) -> PyTree:
    """Where weights decay by default: arrays of two axes and more, but no embeddings.

    Decay holds back the size of a map. A bias shifts it and the scale of a norm has its
    optimum at one, so decay only pulls them off; of an embedding a step moves the rows
    of its batch, and decay would move all others (Loshchilov and Hutter 2019; Karpathy
    2020, "minGPT").

    **Arguments:**
    - `params`: a pytree of parameters.

    **Returns:** a pytree of booleans of the same structure, as masks of Optax are.
    """
    table = lambda node: isinstance(node, nnx.Embed | eqx.nn.Embedding)  # noqa: E731

    def one(node):
        inside = table(node)
        return jax.tree.map(lambda a: jnp.ndim(a) > 1 and not inside, node)

    return jax.tree.map(one, params, is_leaf=table)


class AbstractOptimizer(eqx.Module):
    """Makes the `optax.GradientTransformation` of a run of `steps` steps."""

    @property
    def knows_end(self) -> bool:
        """Whether the updates depend on `steps`, so that a run cannot be made longer.

        They do where there is a `decay`, and by default.
        """
        return bool(getattr(self, "decay", True))

    @abc.abstractmethod
    def transform(self, steps: int) -> optax.GradientTransformation:
        """Clipping, the update rule, and its schedule over `steps` steps."""


def _scheduled(rule, numbers, steps):
    """Clipping, then `rule` with its `numbers`, an `AdamW` or a `Lion`.

    The rate rises linearly, then is constant or falls to zero at `steps`. Everything is
    computed in the precision of the parameters, but in float32 for narrower ones: in
    bfloat16 a moment would not move by a part in a thousand.
    """
    warmup, shape = numbers.warmup, optax.constant_schedule(1.0)
    if numbers.decay:
        shape = optax.cosine_decay_schedule(1.0, max(steps - warmup, 1))
    if warmup:
        ramp = optax.linear_schedule(1 / (warmup + 1), 1.0, warmup)
        shape = optax.join_schedules([ramp, shape], [warmup])

    def chain(params):
        # Numbers are float64 with JAX_ENABLE_X64, whatever the parameters are.
        kind = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
        own = jax.tree.map(lambda a: a.astype(kind), numbers)
        return optax.chain(
            _clip(own.clip),
            rule(
                lambda count: own.learning_rate * shape(count),
                own.b1,
                own.b2,
                weight_decay=own.weight_decay,
                mask=own.mask,
            ),
        )

    def init(params):
        return chain(params).init(at_least_float32(params))

    def update(grads, state, params=None):
        wide = at_least_float32((grads, params))
        return chain(grads).update(wide[0], state, wide[1])

    return optax.GradientTransformation(init, update)


def _clip(most):
    """`optax.clip_by_global_norm`, in the precision of each gradient."""

    def clip(grads, params=None):
        norm = global_norm(grads)

        def one(g):
            small = g / norm.astype(g.dtype) * most.astype(g.dtype)
            return jax.lax.select(norm < most, g, small)

        return jax.tree.map(one, grads)

    return optax.stateless(clip)


def at_least_float32(tree: PyTree) -> PyTree:
    """`tree` with its narrower floating-point arrays as float32."""

    def one(a):
        if not eqx.is_inexact_array(a):
            return a
        return a.astype(jnp.promote_types(a.dtype, jnp.float32))

    return jax.tree.map(one, tree)


def like_dtypes(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` with its arrays in the types of those of `like`."""

    def one(a, b):
        return a.astype(b.dtype) if eqx.is_inexact_array(b) else a

    return jax.tree.map(one, tree, like)


class AdamW(AbstractOptimizer):
    """Adam with decoupled weight decay. Loshchilov and Hutter 2019.

    **Arguments:**
    - `learning_rate`, `weight_decay`, `b1`, `b2`: numbers of the update rule.
    - `clip`: the largest global norm of a gradient.
    - `warmup`: steps of linear warm-up.
    - `decay`: whether the rate falls to zero along a half cosine.
    - `mask`: which parameters `weight_decay` acts on, a function from parameters to
      booleans as in Optax; `matrices`, which leaves out biases, the scales of norms and
      embeddings. None stands for all.
    """

    learning_rate: Scalar = number(1e-3)
    weight_decay: Scalar = number(1e-2)
    b1: Scalar = number(0.9)
    b2: Scalar = number(0.999)
    clip: Scalar = number(1.0)
    warmup: int = eqx.field(default=100, static=True)
    decay: bool = eqx.field(default=True, static=True)
    mask: Callable | None = eqx.field(default=matrices, static=True)

    def transform(self, steps):
        """Clipping, the update rule, and its schedule over `steps` steps."""
        return _scheduled(optax.adamw, self, steps)


class Lion(AbstractOptimizer):
    """u = sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g. Chen et al. 2023.

    The arguments are those of `AdamW`, with a 5 times smaller rate and larger decay.
    """

    learning_rate: Scalar = number(2e-4)
    weight_decay: Scalar = number(5e-2)
    b1: Scalar = number(0.9)
    b2: Scalar = number(0.99)
    clip: Scalar = number(1.0)
    warmup: int = eqx.field(default=100, static=True)
    decay: bool = eqx.field(default=True, static=True)
    mask: Callable | None = eqx.field(default=matrices, static=True)

    def transform(self, steps):
        """Clipping, the update rule, and its schedule over `steps` steps."""
        return _scheduled(optax.lion, self, steps)


class Given(AbstractOptimizer):
    """An Optax transformation as it is; its numbers are static."""

    chain: optax.GradientTransformation = eqx.field(static=True)

    @property
    def knows_end(self) -> bool:
        """No: its schedules are its own."""
        return False

    def transform(self, steps):
        """The transformation."""
        return self.chain


def as_optimizer(
    optimizer: AbstractOptimizer | optax.GradientTransformation,
) -> AbstractOptimizer:
    """An optimiser from what a user may give; ValueError for what is none."""
    if isinstance(optimizer, optax.GradientTransformation):
        optimizer = Given(optimizer)
    if not isinstance(optimizer, AbstractOptimizer):
        raise ValueError(
            "optimizer must be a module such as sdegen.AdamW(), or an Optax "
            f"transformation such as optax.adam(1e-3), got {optimizer!r:.60}."
        )
    return optimizer


def global_norm(tree) -> Scalar:
    """The norm of all the arrays of `tree` together, in float32."""
    wide = (jnp.asarray(g, jnp.float32) for g in jax.tree.leaves(tree))
    return jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in wide))
