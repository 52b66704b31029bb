"""Convolution whose gradients keep the layout that every backend runs fast.

XLA's CPU backend brings a convolution into its fast layout only at the top level of a
program. Inside a loop the gradients of an ordinary one were measured to be 50 to 100
times slower. Here both transposes are convolutions in the fast layout:

    y = x * w,    dx = dy * flip(w)^T,    dw = x^T * dy^T

(^T exchanges channels with batch, or inputs with outputs). It is one bilinear JAX
primitive, so all derivatives work. vmap over x folds into the batch; vmap over w
(trials side by side) is the grouped convolution of `lax`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .._compat import bilinear_primitive

_LECUN = nnx.initializers.lecun_normal()


def conv(
    x: Float[Array, "batch *space inputs"], w: Float[Array, "*kernel inputs outputs"]
) -> Float[Array, "batch *space outputs"]:
    """x * w with stride 1 and zero padding to the same size; kernels are k x .. x k.

    k is odd. There may be any number of spatial axes.
    """
    return _bind(x, w)


def _correlate(x, w, half=None):
    half, space = w.shape[0] // 2 if half is None else half, "DHW"[5 - x.ndim :]
    layout, strides = f"N{space}C", (1,) * len(space)
    pad, numbers = ((half, half),) * len(space), (layout, f"{space}IO", layout)
    return jax.lax.conv_general_dilated(x, w, strides, pad, dimension_numbers=numbers)


def _transpose_x(dy, x, w):
    return conv(dy, jnp.flip(w, range(w.ndim - 2)).swapaxes(-2, -1))


def _transpose_w(dy, x, w):
    x, dy = x.swapaxes(0, -1), jnp.moveaxis(dy, 0, -2)
    return jnp.moveaxis(_correlate(x, dy, w.aval.shape[0] // 2), 0, -2)


def _batch(arguments, axes):
    (x, w), (x_axis, w_axis) = arguments, axes
    if w_axis is not None:
        return jax.vmap(_correlate, (x_axis, w_axis))(x, w), 0
    x = jnp.moveaxis(x, x_axis, 0)
    y = conv(x.reshape(-1, *x.shape[2:]), w)
    return y.reshape(*x.shape[:2], *y.shape[1:]), 0


_transposes = (_transpose_x, _transpose_w)
_bind = bilinear_primitive("sdegen_conv", _correlate, _transposes, _batch)


class Conv(nnx.Module):
    """A convolution of stride 1 with bias, channels last, k x k for two `axes`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        axes: int = 2,
        kernel_init=_LECUN,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        shape = (*[size] * axes, inputs, outputs)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, param_dtype))

    def __call__(self, x):
        """The convolution of x, computed in `dtype`."""
        dtype = self.dtype or x.dtype
        kernel, bias = self.kernel[...].astype(dtype), self.bias[...].astype(dtype)
        return conv(x.astype(dtype), kernel) + bias
