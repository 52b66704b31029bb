"""DDPM++ and NCSN++: the UNets of score-based modelling (Song et al. 2021).

With the sizes of Karras et al. 2022, table 7, for CIFAR-10. NCSN++ differs by Gaussian
Fourier features of time, the filter [1, 3, 3, 1] when it resamples, and the image,
halved and convolved, in its encoder. Deliberate differences: layers that the paper
starts near zero (1e-5) start at zero; the Fourier frequencies are quantiles, not draws;
there is no input for augmentation labels, which `cond` can carry.
"""

import dataclasses
import functools
import itertools
import math

import jax.numpy as jnp
from flax import nnx

from .abstract_unet import AbstractUNet, AbstractUNetConfig, plan
from .blocks import ResBlock, Style
from .conv import Conv
from .embeddings import normal_frequencies, positional
from .layers import check_halvings, down, group_norm

_INIT = nnx.initializers.glorot_uniform()
_DDPMPP = Style(
    eps=1e-6,
    init=_INIT,
    init_attention=nnx.initializers.variance_scaling(0.2, "fan_avg", "uniform"),
    scale=math.sqrt(0.5),
    project=True,
)
_NCSNPP = dataclasses.replace(_DDPMPP, fir=True)


class ScoreUNet(AbstractUNet):
    """DDPM++, or NCSN++ if `ncsn`; other arguments as in `AbstractUNet`."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        channels: int = 128,
        multiples: tuple[int, ...] = (2, 2, 2),
        blocks: int = 4,
        attention: tuple[int, ...] = (16,),
        ncsn: bool = False,
        cond_dim: int = 0,
        dropout: float = 0.0,
        remat: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.shape = tuple(shape)
        check_halvings(self, shape, len(multiples) - 1)
        self.cond_dim, self.remat, self.ncsn = cond_dim, remat, ncsn
        self.features = channels * (2 if ncsn else 1)
        whole = {"param_dtype": param_dtype, "rngs": rngs}  # time is not rounded
        options = {"dtype": dtype, **whole}

        def linear(inputs, outputs):
            return nnx.Linear(inputs, outputs, kernel_init=_INIT, **whole)

        width = 4 * channels
        self.cond = linear(cond_dim, self.features) if cond_dim else None
        self.map1, self.map2 = linear(self.features, width), linear(width, width)
        self.first = Conv(shape[-1], channels, kernel_init=_INIT, **options)
        widths = [channels * multiple for multiple in multiples]
        style = _NCSNPP if ncsn else _DDPMPP
        places = plan(shape[0], channels, widths, blocks, attention, attend_once=True)
        res = functools.partial(ResBlock, width=width, style=style, dropout=dropout)
        self.encoder, self.decoder = (
            nnx.List([res(place, **options) for place in part]) for part in places
        )
        # The image at each lower resolution gets the features of the block there.
        lower = [p.outputs for p in places[0] if p.resample == "down"] if ncsn else []
        pairs = itertools.pairwise([shape[-1], *lower])
        self.image = nnx.List([Conv(*p, kernel_init=_INIT, **options) for p in pairs])
        self.norm = group_norm(widths[0], epsilon=style.eps, **options)
        zeros = nnx.initializers.zeros
        self.last = Conv(widths[0], shape[-1], kernel_init=zeros, **options)

    def embed(self, t, cond):
        """The embedding of time and condition."""
        if self.ncsn:
            w = jnp.asarray(normal_frequencies(self.features // 2, 16.0), t.dtype)
            phase = t[..., None] * w
            e = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
        else:
            e = positional(t, self.features, endpoint=True)
        if self.cond is not None:
            e = e + self.cond(cond * math.sqrt(self.cond_dim))
        return nnx.silu(self.map2(nnx.silu(self.map1(e))))

    def predict(self, x, emb, key):
        """The prediction for x."""
        image, convolutions = x, iter(self.image)

        def add_image(h):
            nonlocal image
            # Convolve also where the filter reaches beyond the border.
            wide = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
            small = down(next(convolutions)(wide), True, padded=True)
            image = math.sqrt(0.5) * (h + small)
            return image

        halved = add_image if self.ncsn else None
        h = self.run(self.first(x), emb, key, halved=halved)
        return self.last(nnx.silu(self.norm(h)))


@dataclasses.dataclass(frozen=True)
class AbstractScoreConfig(AbstractUNetConfig):
    """A `ScoreUNet` for CIFAR-10; the paper's for 64 x 64 has the multiples 1 2 2 2."""

    network = ScoreUNet
    channels: int = 128
    multiples: tuple[int, ...] = (2, 2, 2)
    blocks: int = 4
    attention: tuple[int, ...] = (16,)
    dropout: float = dataclasses.field(default=0.13, kw_only=True)


@dataclasses.dataclass(frozen=True)
class DDPMppConfig(AbstractScoreConfig):
    """DDPM++ for CIFAR-10; the paper's for 64 x 64 has the multiples 1 2 2 2."""


@dataclasses.dataclass(frozen=True)
class NCSNppConfig(AbstractScoreConfig):
    """NCSN++ for CIFAR-10; the paper's for 64 x 64 has the multiples 1 2 2 2."""

    def sizes(self):
        """The arguments of the network."""
        return super().sizes() | {"ncsn": True}
