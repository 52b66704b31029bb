"""A network's hyperparameters as a frozen dataclass that makes the network."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from .. import mesh as meshes
from .mlp import MLP
from .unet import UNet


def init(
    make: Callable[[nnx.Rngs], nnx.Module], key: jax.Array, mesh: Mesh | None = None
) -> nnx.Module:
    """`make(rngs)` under one jit: eager initialisation takes seconds for deep networks.

    For example `init(lambda rngs: MLP((2,), rngs=rngs), jax.random.key(0))`. On a
    `mesh` the parameters are born where `sdegen.mesh.parameter_sharding` puts them: no
    device ever holds what it does not keep.
    """

    def network(key):
        return make(nnx.Rngs(key))

    if mesh is None:
        return jax.jit(network)(key)
    abstract = jax.eval_shape(network, key)
    shardings = jax.tree.leaves(meshes.parameter_sharding(abstract, mesh))
    leaves = jax.jit(lambda key: jax.tree.leaves(network(key)), out_shardings=shardings)
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves(key))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractRecipe(abc.ABC):
    """What a network is made with, from Python or from a command line."""

    dropout: float = 0.0
    """Share of features set to zero while training."""
    remat: bool = False
    """Compute every block again for gradients: less memory, a third more work."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What layers compute in; "float32" stands for the precision of the input."""

    @abc.abstractmethod
    def make(self, shape: tuple[int, ...], **options) -> nnx.Module:
        """The network for samples of `shape`; `options` are those of its class."""

    def __call__(
        self,
        shape: tuple[int, ...],
        key: jax.Array,
        *,
        cond_dim: int = 0,
        mesh: Mesh | None = None,
    ) -> nnx.Module:
        """A new network for samples of `shape`, a function of the key.

        `cond_dim` is the length of the condition vector, 0 for none; on a `mesh` the
        parameters are born sharded.
        """
        options = {"cond_dim": cond_dim, "dropout": self.dropout, "remat": self.remat}
        options["dtype"] = {"float32": None, "bfloat16": jnp.bfloat16}[self.dtype]
        return init(lambda rngs: self.make(shape, rngs=rngs, **options), key, mesh)


@dataclasses.dataclass(frozen=True)
class MLPConfig(AbstractRecipe):
    """A residual multilayer perceptron."""

    width: int = 128
    """Features of every layer."""
    depth: int = 3
    """Residual blocks."""

    def make(self, shape: tuple[int, ...], **options) -> MLP:
        """The network for samples of `shape`."""
        return MLP(shape, width=self.width, depth=self.depth, **options)


@dataclasses.dataclass(frozen=True)
class UNetConfig(AbstractRecipe):
    """A small UNet for images."""

    channels: int = 32
    """Features at full resolution."""
    multiples: tuple[int, ...] = (1, 2)
    """Multiples of `channels`, one for each halving of the resolution."""
    blocks: int = 1
    """Residual blocks per resolution."""

    def make(self, shape: tuple[int, int, int], **options) -> UNet:
        """The network for images of `shape`."""
        return UNet(
            shape,
            channels=self.channels,
            multiples=self.multiples,
            blocks=self.blocks,
            **options,
        )
