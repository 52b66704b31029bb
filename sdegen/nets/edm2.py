"""EDM2: the UNet whose layers preserve the magnitude of their inputs.

Karras et al. 2024, configuration G, figure 21, with the layers of
`magnitude_preserving`. Deliberate differences: the Fourier frequencies and phases are
quantiles, not draws; the head for the log-variance of the loss is not part of it.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from .abstract_unet import AbstractUNet, Place, plan
from .layers import attend, check_halvings, dropout, resample
from .magnitude_preserving import MPConv, mp_cat, mp_fourier, mp_silu, mp_sum, normalise
from .network import AbstractNetworkConfig

_CLIP = 256.0  # on activations, for half precision
_BRANCH = 0.3  # m in (3) of a residual branch and of the attention


class MPBlock(nnx.Module):
    """A residual block with attention, magnitude-preserving (figure 21).

    The encoder's blocks project and normalise every pixel before the branch; the
    decoder's project after it.
    """

    def __init__(self, place: Place, width, *, encodes, head, dropout, **options):
        inputs, outputs = place.inputs, place.outputs
        self.resample, self.joins, self.dropout = place.resample, place.joins, dropout
        self.encodes, self.heads = encodes, max(1, outputs // head)
        self.conv1 = MPConv(outputs if encodes else inputs, outputs, 3, **options)
        self.emb = MPConv(width, outputs, **options)
        self.gain = nnx.Param(jnp.zeros((), options["param_dtype"]))
        self.conv2 = MPConv(outputs, outputs, 3, **options)
        attends = place.attention
        self.skip = MPConv(inputs, outputs, **options) if inputs != outputs else None
        self.qkv = MPConv(outputs, 3 * outputs, **options) if attends else None
        self.out = MPConv(outputs, outputs, **options) if attends else None

    def __call__(self, h, emb, key=None):
        """The block at embedding `emb`, (width,) or (batch, width)."""
        h = resample(h, self.resample)
        if self.encodes:
            h = normalise(h if self.skip is None else self.skip(h), -1)
        r = self.conv1(mp_silu(h))
        r = mp_silu(r * (1 + self.emb(emb, self.gain[...])[..., None, None, :]))
        r = self.conv2(dropout(r, self.dropout, key))
        if not self.encodes and self.skip is not None:
            h = self.skip(h)
        h = mp_sum(h, r, _BRANCH)
        if self.qkv is not None:
            shape = (h.shape[0], -1, 3, self.heads, h.shape[-1] // self.heads)
            qkv = normalise(self.qkv(h).reshape(shape), -1)
            h = mp_sum(h, self.out(attend(qkv).reshape(h.shape)), _BRANCH)
        return jnp.clip(h, -_CLIP, _CLIP)


class EDM2UNet(AbstractUNet):
    """EDM2, for x of magnitude about 1, as `edm_inputs` makes it.

    **Arguments:** as in `AbstractUNet`, with the defaults of the paper's XS, and
    - `head`: features of each head of the attention, default 64.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        channels: int = 128,
        multiples: tuple[int, ...] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: tuple[int, ...] = (16, 8),
        head: int = 64,
        cond_dim: int = 0,
        dropout: float = 0.0,
        remat: bool = False,
        dtype=None,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.shape = tuple(shape)
        check_halvings(self, shape, len(multiples) - 1)
        self.cond_dim, self.remat = cond_dim, remat
        widths = [channels * multiple for multiple in multiples]
        self.features, width = widths[0], max(widths)
        whole = {"param_dtype": param_dtype, "rngs": rngs}  # time is not rounded
        options = {"dtype": dtype, **whole}
        self.time = MPConv(self.features, width, **whole)
        self.cond = MPConv(cond_dim, width, **whole) if cond_dim else None
        self.first = MPConv(shape[-1] + 1, widths[0], 3, **options)
        places = plan(shape[0], widths[0], widths, blocks, attention)
        options |= {"head": head, "dropout": dropout}
        self.encoder, self.decoder = (
            nnx.List([MPBlock(p, width, encodes=encodes, **options) for p in ps])
            for ps, encodes in zip(places, (True, False), strict=True)
        )
        self.last = MPConv(widths[0], shape[-1], 3, dtype=dtype, **whole)
        self.gain = nnx.Param(jnp.zeros((), param_dtype))

    def embed(self, t, cond):
        """The embedding of time and condition."""
        emb = self.time(mp_fourier(t, self.features))
        if self.cond is not None:
            emb = mp_sum(emb, self.cond(cond * math.sqrt(self.cond_dim)))
        return mp_silu(emb)

    def predict(self, x, emb, key):
        """The prediction for x."""
        # A feature of ones does what biases would.
        h = self.first(jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1))
        return self.last(self.run(h, emb, key, join=mp_cat), self.gain[...])


_CHANNELS = {"XXS": 64, "XS": 128, "S": 192, "M": 256, "L": 320, "XL": 384, "XXL": 448}


@dataclasses.dataclass(frozen=True)
class EDM2Config(AbstractNetworkConfig):
    """EDM2 for 64 x 64 (latents or pixels); from M on the paper has dropout 0.1."""

    network = EDM2UNet
    presets = {size: {"channels": n} for size, n in _CHANNELS.items()}
    size: Literal["XXS", "XS", "S", "M", "L", "XL", "XXL"] = "XS"
    """64, 128, 192, 256, 320, 384 or 448 channels."""
    channels: int | None = None  # the unit of features, in place of that of `size`
    multiples: tuple[int, ...] = (1, 2, 3, 4)  # of `channels`, one for each halving
    blocks: int = 3  # residual blocks per resolution
    attention: tuple[int, ...] = (16, 8)  # heights in pixels with attention
