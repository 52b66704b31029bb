"""Linear algebra without matrices, for a batch of problems at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ...typing import is_traced


def inner(a: Float[Array, "batch ..."], b: Float[Array, "batch ..."]) -> Array:
    """The inner product of each sample, shaped to multiply one."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)


def conjugate_gradients(
    matrix: Callable, b: Float[Array, "batch ..."], iterations: int
) -> Float[Array, "batch ..."]:
    """x with matrix(x) = b, for a symmetric positive matrix of each sample.

    Hestenes and Stiefel 1952, with a fixed number of steps. A sample that has converged
    or whose matrix is not positive stays as it is.
    """
    tiny = jnp.finfo(b.dtype).eps ** 2

    def step(carry, _):
        x, residual, direction, size = carry
        product = matrix(direction)
        curvature = inner(direction, product)
        go = (size > tiny * inner(b, b)) & (curvature > 0)
        pace = jnp.where(go, size / jnp.where(go, curvature, 1.0), 0.0)
        x, residual = x + pace * direction, residual - pace * product
        new = inner(residual, residual)
        turn = jnp.where(go, new / jnp.where(go, size, 1.0), 0.0)
        size = jnp.where(go, new, size)
        direction = jnp.where(go, residual + turn * direction, direction)
        return (x, residual, direction, size), None

    start = (jnp.zeros_like(b), b, b, inner(b, b))
    return jax.lax.scan(step, start, length=iterations)[0][0]


def is_linear(operator: Callable, shape: tuple[int, ...]) -> bool:
    """Whether A(2x - y) is 2 A(x) - A(y) for two random samples; True where traced."""
    x, y = _probes(shape)
    a, b, both = (operator(u) for u in (x, y, 2 * x - y))
    return is_traced(both) or np.allclose(both, 2 * a - b, rtol=1e-3, atol=1e-3)


def check_linear(operator: Callable, shape: tuple[int, ...], what: str) -> None:
    """Refuse an operator that is not linear on two random samples of `shape`."""
    if not is_linear(operator, shape):
        raise ValueError(
            f"{what} is for a linear operator, and this one is not: A(2x - y) is not "
            "2 A(x) - A(y). DPS, PiGDM, TMPD and TwistedParticles take any."
        )


def is_projection(operator: Callable, shape: tuple[int, ...]) -> bool:
    """Whether a linear operator has A A' A = A, as a mask has; True where traced."""
    x, _ = _probes(shape)
    once = operator(x)
    again = operator(jax.linear_transpose(operator, x)(once)[0])
    return is_traced(again) or np.allclose(again, once, rtol=1e-3, atol=1e-3)


def check_projection(operator: Callable, shape: tuple[int, ...], what: str) -> None:
    """Refuse an operator without A A' A = A, such as a mask has."""
    check_linear(operator, shape, what)
    if not is_projection(operator, shape):
        raise ValueError(
            f"the operator of {what} must be a mask or have orthonormal rows, and this "
            "one has not: A A' A is not A. Use PiGDM, TMPD or TwistedParticles."
        )


def _probes(shape):
    random = np.random.default_rng(0)
    return tuple(jnp.asarray(random.standard_normal(shape)) for _ in range(2))
