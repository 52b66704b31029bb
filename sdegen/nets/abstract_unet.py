"""The UNet of ADM, DDPM++, NCSN++ and EDM2: the order of its blocks, and a call."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ..typing import DropoutKey
from .network import AbstractNetwork, AbstractNetworkConfig


@dataclasses.dataclass(frozen=True)
class Place:
    """One block of a UNet: features in and out, attention, resolution, skip."""

    inputs: int
    outputs: int
    attention: bool = False
    resample: str = "keep"  # "down" and "up" change the resolution first
    joins: bool = False  # whether a skip connection, counted in `inputs`, enters


def plan(
    side: int,
    first: int,
    widths: Sequence[int],
    blocks: int,
    attention: Sequence[int],
    *,
    attend_once: bool = False,
) -> tuple[list[Place], list[Place]]:
    """The encoder and the decoder of a UNet, block by block.

    There are `first` features at the input and `widths[l]` at resolution side / 2^l.
    Resolutions in `attention` have attention, and so has the middle; with `attend_once`
    only the last block of each resolution of the decoder.
    """
    encoder, skips, now = [], [first], first
    for level, width in enumerate(widths):
        attends = side >> level in attention
        if level:
            encoder.append(Place(now, now, resample="down"))
            skips.append(now)
        for _ in range(blocks):
            encoder.append(Place(now, width, attends))
            skips.append(now := width)
    decoder = [Place(now, now, attention=True), Place(now, now)]
    for level in reversed(range(len(widths))):
        if level < len(widths) - 1:
            decoder.append(Place(now, now, resample="up"))
        for i in range(blocks + 1):
            attends = side >> level in attention and (i == blocks or not attend_once)
            inputs, now = now + skips.pop(), widths[level]
            decoder.append(Place(inputs, now, attends, joins=True))
    return encoder, decoder


class AbstractUNet(AbstractNetwork):
    """An encoder and a decoder in the order of `plan`.

    **Arguments** (of the subclasses):
    - `shape`: of one image, (height, width, channels).
    - `channels`: the unit of features.
    - `multiples`: of `channels` at each halving of the resolution.
    - `blocks`: residual blocks per resolution; one more on the way up.
    - `attention`: the heights in pixels at which there is attention.
    - `cond_dim`: of the condition, one-hot or of unit length; default 0 for none.
    - `param_dtype`: of the parameters, default float32.
    - `dropout`, `remat`, `dtype`, `rngs`: as in `AbstractNetwork`.
    """

    encoder: nnx.List
    decoder: nnx.List

    def run(
        self,
        h: Any,
        emb: Any,
        key: DropoutKey | None,
        *,
        join: Callable[[Any, Any], Any] = lambda *hs: jnp.concatenate(hs, -1),
        halved: Callable[[Any], Any] | None = None,
    ) -> Any:
        """All blocks, from the first features h; `halved` changes h after a halving."""
        run, skips = self.runner(emb, key), [h]
        for block in self.encoder:
            h = run(block, h)
            if halved is not None and block.resample == "down":
                h = halved(h)
            skips.append(h)
        for block in self.decoder:
            h = run(block, join(h, skips.pop()) if block.joins else h)
        return h


@dataclasses.dataclass(frozen=True)
class AbstractUNetConfig(AbstractNetworkConfig):
    """The sizes of a UNet."""

    channels: int  # the unit of features
    multiples: tuple[int, ...]  # of `channels`, one for each halving of the resolution
    blocks: int  # residual blocks per resolution
    attention: tuple[int, ...]  # heights in pixels at which there is attention
