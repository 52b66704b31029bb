"""ADM: the UNet of "Diffusion models beat GANs" (Dhariwal and Nichol 2021).

With the sizes of Karras et al. 2022, table 7, for ImageNet at 64 x 64. Deliberate
difference: biases start at zero; the paper draws them like the weights.
"""

import dataclasses
import functools

import jax.numpy as jnp
from flax import nnx

from .abstract_unet import AbstractUNet, AbstractUNetConfig, plan
from .blocks import ResBlock, Style
from .conv import Conv
from .embeddings import positional
from .layers import check_halvings, group_norm

_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_STYLE = Style(eps=1e-5, init=_INIT, init_attention=_INIT, film=True, head=64)


class ADMUNet(AbstractUNet):
    """ADM; arguments as in `AbstractUNet`, with the defaults of the paper."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        channels: int = 192,
        multiples: tuple[int, ...] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: tuple[int, ...] = (32, 16, 8),
        cond_dim: int = 0,
        dropout: float = 0.0,
        remat: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.shape = tuple(shape)
        check_halvings(self, shape, len(multiples) - 1)
        self.cond_dim, self.remat, self.channels = cond_dim, remat, channels
        whole = {"param_dtype": param_dtype, "rngs": rngs}  # time is not rounded
        options, width = {"dtype": dtype, **whole}, 4 * channels

        def linear(inputs, init=_INIT, **more):
            return nnx.Linear(inputs, width, kernel_init=init, **more, **whole)

        self.map1, self.map2 = linear(channels), linear(width)
        normal = nnx.initializers.normal(1.0)
        self.cond = linear(cond_dim, normal, use_bias=False) if cond_dim else None
        widths = [channels * multiple for multiple in multiples]
        self.first = Conv(shape[-1], widths[0], kernel_init=_INIT, **options)
        res = functools.partial(ResBlock, width=width, style=_STYLE, dropout=dropout)
        self.encoder, self.decoder = (
            nnx.List([res(place, **options) for place in part])
            for part in plan(shape[0], widths[0], widths, blocks, attention)
        )
        self.norm = group_norm(widths[0], epsilon=_STYLE.eps, **options)
        zeros = nnx.initializers.zeros
        self.last = Conv(widths[0], shape[-1], kernel_init=zeros, **options)

    def embed(self, t, cond):
        """The embedding of time and condition."""
        emb = self.map2(nnx.silu(self.map1(positional(t, self.channels))))
        return nnx.silu(emb if self.cond is None else emb + self.cond(cond))

    def predict(self, x, emb, key):
        """The prediction for x."""
        return self.last(nnx.silu(self.norm(self.run(self.first(x), emb, key))))


@dataclasses.dataclass(frozen=True)
class ADMConfig(AbstractUNetConfig):
    """ADM with the sizes for ImageNet at 64 x 64."""

    network = ADMUNet
    channels: int = 192
    multiples: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 3
    attention: tuple[int, ...] = (32, 16, 8)
    dropout: float = dataclasses.field(default=0.1, kw_only=True)
