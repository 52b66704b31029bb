"""A corruption system: a way to corrupt data, and a way to take one step back.

    x_t ~ p(x_t | x0),              t = 0 is data, t increases with corruption      (1)
    x_s ~ p(x_s | x_t, x0_hat),     s < t, x0_hat from a network                    (2)

A step is right when it keeps the distribution of the corruption,

    integral of p(x_s | x_t, x0) p(x_t | x0) dx_t = p(x_s | x0).                    (3)

A chain of such steps with x0_hat drawn from p(x0 | x_t) turns the distribution of fully
corrupted data into that of the data (Su 2022, "unified diffusion model").
"""

import abc
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from ..typing import RandomKey, Scalar

State: TypeAlias = Num[Array, "..."]


class AbstractCorruption(eqx.Module):
    """A corruption (1), its step back (2), and the error of a network's prediction.

    For one sample and scalar times. The prediction is x0_hat, or logits of tokens.
    """

    @abc.abstractmethod
    def corrupt(self, key: RandomKey, t: Scalar, x0: State) -> State:
        """A draw of x_t given x0, equation (1)."""

    @abc.abstractmethod
    def revert(
        self, key: RandomKey, s: Scalar, t: Scalar, x: State, prediction: State
    ) -> State:
        """A draw of x_s given x_t = x and the prediction there, equation (2)."""

    @abc.abstractmethod
    def error(self, t: Scalar, x0: State, x: State, prediction: State) -> Scalar:
        """What training minimises, for a prediction at x_t = x."""

    @abc.abstractmethod
    def prior(self, key: RandomKey, shape: tuple[int, ...], dtype=None) -> State:
        """A draw of the state at the last time, for data of shape `shape`."""

    @abc.abstractmethod
    def times(self, steps: int | None, shape: tuple[int, ...]) -> Array:
        """The falling times of a chain of `steps` steps; None for its default."""

    @abc.abstractmethod
    def training_time(self, u: Scalar, shape: tuple[int, ...]) -> Scalar:
        """The quantile at u in (0, 1) of the training times."""


def equal_steps(steps: int | None, default: int) -> Float[Array, " times"]:
    """From 1 to 0 in equal steps."""
    steps = default if steps is None else steps
    if steps < 1:
        raise ValueError(f"a chain needs at least one step, got steps={steps}.")
    return jnp.arange(steps, -1, -1, dtype=jnp.result_type(float)) / steps


def corrupted_example(
    key: RandomKey, system: AbstractCorruption, examples: Array | None, shape, dtype
) -> State:
    """One of the examples of a system at t = 1: a draw of its prior."""
    name = type(system).__name__
    if examples is None:
        raise ValueError(
            f"the chain of {name} starts at corrupted data, got none. Make it with "
            "examples=, an array of data, or sample with start=."
        )
    if examples.shape[1:] != shape:
        raise ValueError(
            f"the examples of this {name} must be data of shape {shape}, got "
            f"{examples.shape[1:]} behind the leading axis."
        )
    pick, noise = jax.random.split(key)
    x0 = examples[jax.random.randint(pick, (), 0, len(examples))]
    x0 = x0.astype(dtype or jnp.result_type(float))
    return system.corrupt(noise, jnp.ones((), x0.dtype), x0)


def data_field() -> Any:
    """A field of examples, None by default."""
    return eqx.field(
        default=None, converter=lambda x: None if x is None else jnp.asarray(x)
    )
