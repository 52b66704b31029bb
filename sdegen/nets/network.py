"""What every network is, and the frozen dataclass that makes one."""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from .. import mesh as meshes
from ..typing import DropoutKey, Seed, Time, check_labels, is_labels, random_key
from .embeddings import Embedding
from .layers import call, fold_in

Samples: TypeAlias = Float[Array, "batch ..."]


class AbstractNetwork(nnx.Module):
    """(t, x, cond) -> an array of the shape of x, for samples of one shape.

    A subclass sets these fields and writes `predict`, and `embed` or an `embedding`.
    Any callable with the signature of `__call__` is a network too.

    **Arguments** (of the subclasses):
    - `cond_dim`: the length of the condition vector, default 0 for none.
    - `dropout`: the share of features that a call with a `key` sets to zero, default 0.
    - `remat`: compute each block again for gradients, default False.
    - `dtype`: to compute in, default that of the input; time is never rounded to it.
    - `rngs`: the source of the random parameters, in float32.
    """

    shape: tuple[int, ...]
    cond_dim: int
    remat: bool
    embedding: Embedding

    def embed(self, t: Time, cond: Array | None) -> Float[Array, "... width"]:
        """Time and condition as one vector: (width,) or (batch, width)."""
        return self.embedding(t, cond)

    @abc.abstractmethod
    def predict(self, x: Samples, emb: Array, key: DropoutKey | None) -> Samples:
        """The prediction for x, given what `embed` returns."""

    def __call__(
        self,
        t: Time,
        x: Samples,
        cond: Array | None = None,
        *,
        key: DropoutKey | None = None,
    ) -> Samples:
        """The prediction, of the shape of x, in the dtype of the layers.

        **Arguments:**
        - `t`: times of order one, () for the whole batch or (batch,).
        - `x`: samples, (batch, *shape), channels last.
        - `cond`: conditions, (batch, cond_dim), or integer labels (batch,), see
          `condition_vectors`; None (the default) if `cond_dim` is 0.
        - `key`: turns dropout on; () for the batch or (batch,), one for each sample.

        **Raises:** `ValueError` for an x or a cond of another shape.
        """
        cond = condition_vectors(self, x, cond)
        return self.predict(x, self.embed(t, cond), key)

    def runner(self, emb: Array, key: DropoutKey | None) -> Callable[[Any, Array], Any]:
        """run(block, h) = block(h, emb, key), with a key of its own for each block."""
        numbers = itertools.count()

        def run(block, h):
            return call(block, h, emb, fold_in(key, next(numbers)), remat=self.remat)

        return run


def condition_vectors(
    network: Any, x: Array, cond: Array | None
) -> Float[Array, "batch cond"] | None:
    """The conditions of a batch as vectors; what the network cannot take is refused.

    Integer labels (batch,) become one-hot vectors of length `cond_dim`. The label
    `cond_dim` stands for no class and becomes zeros, and so does, inside `jit`, any
    label that is out of range.
    """
    cond_dim = network.cond_dim
    if x.shape[1:] != network.shape:
        batch = ", ".join(map(str, ("batch", *network.shape)))
        raise ValueError(
            f"this {type(network).__name__} was made for x of shape ({batch}), got "
            f"{x.shape}. Check the shape of the samples, channels last."
        )
    if not cond_dim:
        if cond is None:
            return None
        raise ValueError(
            "this network was made without a condition, got one. Make it with "
            "cond_dim=the length of the condition vector, or classes=their number."
        )
    shape = None if cond is None else jnp.shape(cond)
    if shape == (len(x), cond_dim):
        return cond
    if cond_dim > 1 and is_labels(cond) and shape == x.shape[:1]:
        check_labels(cond, cond_dim)
        return jax.nn.one_hot(cond, cond_dim, dtype=x.dtype)
    came = "none" if cond is None else f"one of shape {shape} and type {cond.dtype}"
    raise ValueError(
        "this network was made for a condition of integer labels (batch,) or vectors "
        f"(batch, {cond_dim}), got {came} for a batch of {len(x)}."
    )


def init(
    make: Callable[[nnx.Rngs], nnx.Module], key: Seed, mesh: Mesh | None = None
) -> nnx.Module:
    """`make(rngs)` under one jit, which is seconds faster for deep networks.

    **Arguments:**
    - `make`: makes the network, such as `lambda rngs: MLP((2,), rngs=rngs)`.
    - `key`: the random key; equal keys give equal networks.
    - `mesh`: where parameters are created sharded (`sdegen.mesh.parameter_sharding`);
      default one device.
    """
    network, key = lambda key: make(nnx.Rngs(key)), random_key(key)
    if mesh is None:
        return jax.jit(network)(key)
    abstract = jax.eval_shape(network, key)
    shardings = jax.tree.leaves(meshes.parameter_sharding(abstract, mesh))
    leaves = jax.jit(lambda key: jax.tree.leaves(network(key)), out_shardings=shardings)
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves(key))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractNetworkConfig:
    """The hyperparameters of a network, set in Python or on a command line.

    A subclass adds fields, the arguments of the class that it names as `network`. A
    field `size` chooses from `presets` what replaces fields that are None.
    """

    dropout: float = 0.0  # share of features set to zero while training
    remat: bool = False  # compute blocks again for gradients: less memory, more work
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What layers compute in; "float32" stands for the precision of the input."""
    classes: int = 0  # of integer labels as conditions, cond_dim by another name
    network: ClassVar[type[nnx.Module]]
    presets: ClassVar[Mapping[str, Mapping[str, int]]] = {}

    def sizes(self) -> dict[str, Any]:
        """The arguments of `network` that this class of configurations adds."""
        common = {field.name for field in dataclasses.fields(AbstractNetworkConfig)}
        own = {k: v for k, v in vars(self).items() if k not in common}
        preset = self.presets.get(own.pop("size", ""), {})
        return own | {name: own[name] or value for name, value in preset.items()}

    def make(self, shape: tuple[int, ...], **options: Any) -> nnx.Module:
        """The network, made without `jit`, with default `dropout`, `remat`, `dtype`.

        **Arguments:**
        - `shape`: of one sample, channels last.
        - `options`: other arguments of `network`, such as `rngs` and `cond_dim`.
        """
        if self.classes:
            dim = options.setdefault("cond_dim", self.classes) or self.classes
            if self.classes < 2 or dim != self.classes:
                raise ValueError(
                    "classes is the number of classes, 2 or more, and the length of "
                    f"the condition, got classes={self.classes} and cond_dim={dim}."
                )
            options["cond_dim"] = dim
        return self.network(shape, **self.sizes(), **options)

    def __call__(
        self,
        shape: tuple[int, ...],
        key: Seed,
        *,
        cond_dim: int = 0,
        mesh: Mesh | None = None,
    ) -> nnx.Module:
        """A new network, made under one `jit`.

        **Arguments:**
        - `shape`: of one sample, channels last.
        - `key`: the random key; equal keys give equal networks.
        - `cond_dim`: the length of the condition vector, default 0 for none.
        - `mesh`: the mesh on which the parameters are created sharded, default none.
        """
        if mesh is None:
            return _made(self, tuple(shape), cond_dim, random_key(key))
        return init(lambda rngs: self._new(shape, cond_dim, rngs), key, mesh)

    def _new(self, shape, cond_dim, rngs):
        options = {"cond_dim": cond_dim, "dropout": self.dropout, "remat": self.remat}
        options["dtype"] = {"float32": None, "bfloat16": jnp.bfloat16}[self.dtype]
        return self.make(shape, rngs=rngs, **options)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _made(config, shape, cond_dim, key):
    """A network of a configuration: one program for all of its keys."""
    return config._new(shape, cond_dim, nnx.Rngs(key))
