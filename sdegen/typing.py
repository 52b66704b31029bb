"""Array aliases and the float converter, which every room imports.

Scalars in signatures are `ScalarLike`: a user may pass a Python float where the library
passes a traced array. Fields are always arrays (`number`), so that changing a value
never retraces and every field can be differentiated and vmapped.
"""

from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Key, Shaped

Scalar: TypeAlias = Float[Array, ""]
ScalarLike: TypeAlias = float | int | Shaped[Array, ""]
Levels: TypeAlias = float | int | Shaped[Array, "..."]
"""A number for all coordinates of a sample, or one for each."""
Time: TypeAlias = Float[Array, "..."]
"""A time seen by a network: () for the whole batch, or (batch,)."""
RandomKey: TypeAlias = Key[Array, ""]
DropoutKey: TypeAlias = Key[Array, "..."]
"""One key for a batch, () or one for each sample, (batch,)."""
AxisName: TypeAlias = str | tuple[str, ...]
"""The mapped axis, or axes, of which a batch is one device's part."""
PyTree: TypeAlias = Any


def float_array(x: Any) -> Array:
    """`x` as a strongly typed floating-point array; float arrays keep their dtype."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.convert_element_type(x, x.dtype)
    return jnp.asarray(x, dtype=jnp.result_type(float))


def number(default: Any = ...) -> Any:
    """A field of a module that holds a number (or numbers) as a float array.

    **Arguments:**
    - `default`: of the field, which is required without one. With None the field may
      also be None, "not given".
    """
    if default is None:
        return eqx.field(
            default=None, converter=lambda x: None if x is None else float_array(x)
        )
    if default is ...:
        return eqx.field(converter=float_array)
    return eqx.field(default=default, converter=float_array)


def is_traced(tree: PyTree) -> bool:
    """Whether any array in `tree` has no value yet, so that it cannot be checked."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def is_key(x: Array) -> bool:
    """Whether an array holds random keys of the new style (`jax.random.key`)."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
