"""Networks that were written elsewhere, as networks of sdegen."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array

from ..typing import DropoutKey, PyTree, Time, argument_order, is_whole
from .network import Samples

_NAMES = ("t", "x", "cond")


class _Wrapped(eqx.Module):
    """What `wrap` returns: a network that calls another one in its own way."""

    network: Any
    order: tuple[str, ...] = eqx.field(static=True)
    time: int | Callable | None = eqx.field(static=True)
    output: Callable | None = eqx.field(static=True)

    def __call__(
        self, t: Time, x: Samples, cond: PyTree = None, *, key: DropoutKey | None = None
    ) -> Samples:
        """The prediction for x; arguments as in `AbstractNetwork.__call__`."""
        if cond is not None and "cond" not in self.order:
            raise ValueError(
                "this network takes no condition, got one. Leave cond out, or name "
                'its place: wrap(fn, order=("x", "t", "cond")).'
            )
        if callable(self.time):
            t = self.time(t)
        elif self.time is not None:
            t = self.time * t - 1
        drops = key is not None and "key" in inspect.signature(self.network).parameters
        given = {"t": t, "x": x, "cond": cond}
        out = self.network(
            *(given[name] for name in self.order), **({"key": key} if drops else {})
        )
        return _prediction(out, x) if self.output is None else self.output(out)


def _prediction(out: Any, x: Array) -> Any:
    """The first of several outputs; of twice the channels the first half."""
    first = out[0] if isinstance(out, tuple | list) and out else out
    if not isinstance(first, jax.Array) or first.ndim != x.ndim:
        return first
    twice = [i for i in range(1, x.ndim) if first.shape[i] == 2 * x.shape[i]]
    if len(twice) == 1 and first.size == 2 * x.size:
        return jax.lax.slice_in_dim(first, 0, x.shape[twice[0]], axis=twice[0])
    return first


def wrap(
    fn: Callable,
    *,
    order: Sequence[str] | None = None,
    time: int | Callable[[Array], Array] | None = None,
    output: Callable[[Any], Array] | None = None,
) -> Callable:
    """A network with other arguments, times or outputs, as a network (t, x, cond).

    A network of (mean, variance), or of twice the channels (a learned variance, Nichol
    and Dhariwal 2021), predicts by the first of them; the variance is left out.

    **Arguments:**
    - `fn`: the network, a callable pytree; its arrays are trained and saved as usual.
    - `order`: in which order it takes "t", "x" and perhaps "cond", such as ("x", "t").
      By default by the names of its parameters, where they say it (`t`, `timesteps`,
      `x`, `sample`, `cond`, `labels` and the like).
    - `time`: how it counts time, from the t that it gets. A number T stands for the
      steps 0 .. T - 1 of a chain whose step i is at t = i / T: T t - 1. A function maps
      t, such as `lambda t: jnp.round(1000 * t - 1).astype(int)` for a table of steps.
      As it is by default. A `Denoiser` gives t itself with `inputs=sdegen.raw_inputs`,
      and else log(sigma / alpha) / 4.
    - `output`: from what it returns to an array of the shape of x, such as `lambda out:
      out.sample`. By default the array, the first of a tuple or list, or the first half
      of an axis that is twice as long as that of x.

    **Returns:** a callable pytree (t, x, cond, key=None).

    **Raises:** ValueError for an order that is not known, and where `time` is neither
    a whole number >= 2 nor a function.
    """
    if not callable(fn):
        raise ValueError(f"wrap takes a network, something to call, got {fn!r:.60}.")
    names = argument_order(fn) if order is None else tuple(order)
    known = names and {"t", "x"} <= set(names) <= set(_NAMES)
    if not known or len(set(names)) < len(names):
        came = "the parameters do not say it" if order is None else f"got {order!r}"
        raise ValueError(
            'order names the arguments of a network in its order, "t", "x" and perhaps '
            f'"cond": {came}. For example order=("x", "t").'
        )
    if not (time is None or callable(time) or is_whole(time, 2)):
        raise ValueError(
            "time is the number T of a chain's steps, 2 or more, or a function of t, "
            f"got {time!r}."
        )
    return _Wrapped(fn, tuple(names), time, output)
