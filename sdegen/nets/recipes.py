"""A network's hyperparameters as a frozen dataclass that makes the network."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

from .mlp import MLP
from .unet import UNet


def init(make: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> nnx.Module:
    """`make(rngs)` under one jit: eager initialisation takes seconds for deep networks.

    For example `init(lambda rngs: MLP((2,), rngs=rngs), jax.random.key(0))`.
    """
    return jax.jit(lambda key: make(nnx.Rngs(key)))(key)


@dataclasses.dataclass(frozen=True)
class Mlp:
    """A residual multilayer perceptron."""

    width: int = 128
    """Features of every layer."""
    depth: int = 3
    """Residual blocks."""

    def __call__(self, shape: tuple[int, ...], key: jax.Array) -> MLP:
        """The network for samples of `shape`."""
        return init(
            lambda rngs: MLP(shape, width=self.width, depth=self.depth, rngs=rngs), key
        )


@dataclasses.dataclass(frozen=True)
class Unet:
    """A small UNet for images."""

    channels: int = 32
    """Features at full resolution."""
    multiples: tuple[int, ...] = (1, 2)
    """Multiples of `channels`, one for each halving of the resolution."""
    blocks: int = 1
    """Residual blocks per resolution."""

    def __call__(self, shape: tuple[int, int, int], key: jax.Array) -> UNet:
        """The network for images of `shape`."""
        return init(
            lambda rngs: UNet(
                shape,
                channels=self.channels,
                multiples=self.multiples,
                blocks=self.blocks,
                rngs=rngs,
            ),
            key,
        )
