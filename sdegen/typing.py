"""Array aliases and the float converter, which every room imports.

Scalars in signatures are `ScalarLike`: a user may pass a Python float where the library
passes a traced array. Fields are always arrays (`number`), so that changing a value
never retraces and every field can be differentiated and vmapped.
"""

import contextlib
import inspect
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key, Shaped

Scalar: TypeAlias = Float[Array, ""]
ScalarLike: TypeAlias = float | int | Shaped[Array, ""]
Levels: TypeAlias = float | int | Shaped[Array, "..."]
"""A number for all coordinates of a sample, or one for each."""
Time: TypeAlias = Float[Array, "..."]
"""A time seen by a network: () for the whole batch, or (batch,)."""
RandomKey: TypeAlias = Key[Array, ""]
Seed: TypeAlias = RandomKey | int | np.integer
"""A key, or the seed of one: what users give, see `random_key`."""
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


def is_key(x: Array | np.ndarray) -> bool:
    """Whether an array holds random keys of the new style (`jax.random.key`)."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_whole(value: Any, least: int | float = 1) -> bool:
    """Whether `value` is a whole number of at least `least`; True and 2.0 are none."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and bool(value >= least)


def random_key(key: Any) -> RandomKey:
    """One typed key from itself or from a whole number, its seed; else a sentence."""
    one = isinstance(key, jax.Array) and not key.ndim
    if one and is_key(key):
        return key
    if is_whole(key, -np.inf) or (one and jnp.issubdtype(key.dtype, jnp.integer)):
        return jax.random.key(key)
    came = f"{key!r:.60}"
    if isinstance(key, jax.Array):
        came = f"{key.dtype} of shape {key.shape}"
    raise ValueError(
        f"a key is one jax.random.key(seed), or the seed, a whole number, got {came}. "
        "jax.random.PRNGKey makes keys of the old style, and split makes several."
    )


def data_array(
    x: Any, what: str, *, images: bool = False, advice: str = ""
) -> Array | np.ndarray:
    """`x` as one array of data (batch, ...), where it lies; a data frame is one too.

    **Arguments:**
    - `x`: floating-point data; float64 becomes float32 later, where x64 is off.
    - `what`: takes the data, the first word of a sentence.
    - `images`: take uint8 images and videos too, (batch, ..., channels); no.
    - `advice`: for whole numbers, in place of "scale them".

    **Raises:** a ValueError for what is no such array; it says what came.
    """
    a = x
    if not isinstance(x, jax.Array | dict | tuple | None):
        with contextlib.suppress(ValueError):  # rows of different lengths
            a = np.asanyarray(x)
    if not isinstance(a, jax.Array | np.ndarray):
        raise ValueError(
            f"{what} takes one array of data, (batch, ...), got {type(x).__name__}, "
            "which is none. Give the samples alone; labels and vectors go into cond."
        )
    byte = images and a.dtype == np.uint8 and a.ndim >= 3
    if not byte and not jnp.issubdtype(a.dtype, jnp.floating):
        if a.dtype.kind in "iu":
            hint = (
                advice or "Scale it to [-1, 1], as bytes by x / np.float32(127.5) - 1."
            )
        elif a.dtype.kind == "b":
            hint = "Cast booleans, x.astype('float32'); tokens: sdegen.corruption."
        elif a.dtype.kind == "c":
            hint = "Give the real and the imaginary part as two channels."
        else:
            hint = "Keep what is a number, as in frame.select_dtypes('number')."
        kinds = "floating-point data" + " or uint8 images" * images
        came = f"{a.dtype} of shape {a.shape}"
        raise ValueError(f"{what} takes {kinds}, got {came}. {hint}")
    if a.ndim < 2:
        raise ValueError(
            f"{what} takes a batch of data of shape (batch, ...) with at least two "
            f"axes, that is at least one axis per sample, got shape {a.shape}. For 1-D "
            "data use x0[:, None]."
        )
    return a


_ROLES = {
    "t": "t time times timestep timesteps step steps noise_level",
    "x": "x x_t xt x_noisy sample samples state image images",
    "cond": "c cond condition conditions label labels class_labels context y",
}


def argument_order(network: Any) -> tuple[str, ...] | None:
    """The order of "t", "x" and "cond" by the names of a network's first parameters.

    None where they do not say it; "cond" is left out where it is not taken.
    """
    try:
        parameters = inspect.signature(network).parameters.values()
    except (TypeError, ValueError):  # builtins have none
        return None
    found = []
    for one in parameters:
        if one.kind not in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD):
            break
        role = next((k for k, v in _ROLES.items() if one.name in v.split()), None)
        if role is None and one.default is one.empty or role in found:
            return None
        if role is None or len(found) == 3:
            break
        found.append(role)
    return tuple(found) if {"t", "x"} <= set(found) else None


def condition_arrays(cond: PyTree, batch: int | None = None) -> PyTree:
    """A condition with arrays for leaves, each with the batch as its leading axis.

    **Arguments:**
    - `cond`: a pytree of arrays of numbers or random keys, or None.
    - `batch`: the number of samples; None for the condition of one sample.

    **Raises:** a ValueError for another leading axis, for strings and other objects.
    """

    def checked(leaf):
        a = leaf if isinstance(leaf, jax.Array) else np.asanyarray(leaf)
        if not (a.dtype == bool or jnp.issubdtype(a.dtype, np.number) or is_key(a)):
            raise ValueError(
                f"a condition is a pytree of arrays of numbers, got {leaf!r:.60} "
                f"({a.dtype}). Number the classes: integer labels or one-hot vectors."
            )
        if batch is not None and a.shape[:1] != (batch,):
            advice = "Repeat what all samples share: jnp.tile(c, (batch, 1))."
            if not a.ndim:
                advice = "A list is a tree of its items: give one array of them."
            raise ValueError(
                "every array of the condition needs one row per sample, a leading "
                f"axis of {batch}, got the shape {a.shape}. {advice}"
            )
        return a

    return jax.tree.map(checked, cond)


def is_labels(cond: PyTree) -> bool:
    """Whether a condition is one array of integers, a class for each sample."""
    found = getattr(cond, "dtype", None)
    return found is not None and cond.ndim == 1 and jnp.issubdtype(found, jnp.integer)


def check_labels(labels: Array | np.ndarray, classes: int) -> None:
    """Refuse integer labels that are not 0 to `classes` - 1, or `classes` for no class.

    Labels without a value yet, or on other processes, are not looked at.
    """
    if is_traced(labels) or not getattr(labels, "is_fully_addressable", True):
        return
    found = np.asarray(labels)
    if found.size and not (found.min() >= 0 and found.max() <= classes):
        raise ValueError(
            f"labels of {classes} classes are 0 to {classes - 1}, or {classes} for no "
            f"class, got {found.min()} to {found.max()}."
        )
