"""ADM: the UNet of "Diffusion models beat GANs" (Dhariwal and Nichol 2021).

With the sizes that Karras et al. 2022, table 7, train on ImageNet at 64 x 64: 296
million parameters. Compared with DDPM++ it is wider, has attention at three resolutions
with heads of 64 features, its embedding scales and shifts, and the condition enters
after the time. Deliberate difference: biases start at zero; the paper draws them like
the weights.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from .abstract_unet import AbstractUNet, AbstractUNetConfig, plan
from .blocks import Style, res_blocks
from .conv import Conv
from .embeddings import positional
from .layers import check_sides, group_norm

_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_STYLE = Style(
    film=True,
    scale=1.0,
    eps=1e-5,
    fir=False,
    project=False,
    head=64,
    init=_INIT,
    init_attention=_INIT,
)


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
        check_sides(self, shape, len(multiples) - 1)
        self.cond_dim, self.remat, self.channels = cond_dim, remat, channels
        whole = {"param_dtype": param_dtype, "rngs": rngs}  # time is not rounded
        options, width = {"dtype": dtype, **whole}, 4 * channels
        self.map1 = nnx.Linear(channels, width, kernel_init=_INIT, **whole)
        self.map2 = nnx.Linear(width, width, kernel_init=_INIT, **whole)
        normal = nnx.initializers.normal(1.0)
        self.cond = nnx.data(
            nnx.Linear(cond_dim, width, use_bias=False, kernel_init=normal, **whole)
            if cond_dim
            else None
        )
        widths = [channels * multiple for multiple in multiples]
        self.first = Conv(shape[-1], widths[0], kernel_init=_INIT, **options)
        places = plan(shape[0], widths[0], widths, blocks, attention)
        self.encoder, self.decoder = (
            res_blocks(p, width, _STYLE, dropout=dropout, **options) for p in places
        )
        self.norm = group_norm(widths[0], _STYLE.eps, **options)
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

    network = ADMUNet  # pyright: ignore[reportAssignmentType]
    channels: int = 192
    multiples: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 3
    attention: tuple[int, ...] = (32, 16, 8)
    dropout: float = dataclasses.field(default=0.1, kw_only=True)
