"""What was measured: y = A(x0) + std noise, with A any JAX function of one sample."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ...typing import PyTree, Scalar, float_array, is_traced, number


def _numbers(y) -> Array:
    """`y` as real numbers: real and imaginary parts are two, in a last axis."""
    if not jnp.iscomplexobj(y):
        return float_array(y)
    y = jnp.asarray(y)
    return jnp.stack([y.real, y.imag], axis=-1)


class _RealOperator(eqx.Module):
    """An operator whose complex results are two real numbers each."""

    operator: Callable

    def __call__(self, x0):
        out = self.operator(x0)
        return _numbers(out) if isinstance(out, jax.Array) else out


def _real(operator: Callable) -> Callable:
    known = isinstance(operator, _RealOperator) or not callable(operator)
    return operator if known else _RealOperator(operator)


class Measurement(eqx.Module):
    """y = operator(x0) + std times standard normal noise.

    A complex y, or result of A, is kept as its real and imaginary parts in a last axis
    of two: each has noise of its own.

    **Arguments:**
    - `operator`: A, a differentiable function of one sample that returns one array.
    - `y`: one measurement for the whole batch, of the shape of the result of A, or one
      for each sample, with the batch axis in front.
    - `std`: the standard deviation of the noise, in the units of y; 0.05.
    """

    operator: Callable = eqx.field(converter=_real)
    y: Float[Array, "..."] = eqx.field(converter=_numbers)
    std: Scalar = number(0.05)

    def __check_init__(self):
        if is_traced((self.y, self.std)):
            return
        if not 0 <= float(self.std) < np.inf or not np.isfinite(self.y).all():
            raise ValueError(f"y and std >= 0 must be finite, got std={self.std}.")

    def apply(self, x0: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """A of every sample."""
        return jax.vmap(self.operator)(x0)

    def residual(self, x0: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """y - A(x0), in the precision of x0."""
        self.check(x0.shape)
        return (self.y - self.apply(x0)).astype(x0.dtype)

    def log_prob(
        self, x0: Float[Array, "batch ..."], cond: PyTree = None
    ) -> Float[Array, " batch"]:
        """log p(y | x0) of every sample, in nats: a reward (`cond` is not used)."""
        error = self.residual(x0).reshape(len(x0), -1) / self.std
        norming = error.shape[1] * jnp.log(self.std * jnp.sqrt(2 * jnp.pi))
        return (-0.5 * jnp.sum(error**2, axis=1) - norming).astype(x0.dtype)

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse samples (batch, ...) that A maps to another shape than that of y."""
        one = jax.ShapeDtypeStruct(shape[1:], jnp.result_type(float))
        try:
            out = jax.eval_shape(self.operator, one)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the operator could not be applied to one sample of shape {shape[1:]}:"
                f" {str(error):.200}"
            ) from error
        wanted = out.shape if isinstance(out, jax.ShapeDtypeStruct) else None
        if wanted is None or self.y.shape not in (wanted, (shape[0], *wanted)):
            came = type(out).__name__ if wanted is None else wanted
            raise ValueError(
                f"the operator maps one sample of shape {shape[1:]} to {came}, but y "
                f"has the shape {self.y.shape}: give y that shape, or one each. A "
                "complex number is two in a last axis, its real and imaginary part."
            )

    def check_noise(self, what: str) -> None:
        """Refuse std = 0 where it would be divided by."""
        if not is_traced(self.std) and float(self.std) == 0:
            raise ValueError(
                f"{what} divides by the noise of the measurement, and std is 0. Give "
                "it a small one, 1e-3 say."
            )
