"""A condition that is itself an image, as additional channels of the input."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from ..typing import DropoutKey, PyTree, Time
from .network import Samples


class ImageConditioned(eqx.Module):
    """x and an image, joined along the channels (Saharia et al. 2022, "Palette").

    **Arguments:**
    - `network`: made for samples (h, w, c + k), with k the channels of the image. The
      first c channels of what it returns are the prediction.
    """

    network: Any

    def __call__(
        self, t: Time, x: Samples, cond: PyTree = None, *, key: DropoutKey | None = None
    ) -> Samples:
        """The prediction for x; other arguments as in `AbstractNetwork.__call__`.

        **Arguments:**
        - `cond`: "image", (batch, h, w, k), and "vector" if the network takes one.
        """
        image = cond.get("image") if isinstance(cond, dict) else None
        if image is None or not set(cond) <= {"image", "vector"}:
            came = sorted(cond) if isinstance(cond, dict) else type(cond).__name__
            raise ValueError(
                'the condition must be a dictionary with "image" and perhaps "vector", '
                f"got {came}."
            )
        if image.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                "the image of the condition needs the batch, height and width of x, "
                f"{x.shape[:-1]}, got {image.shape[:-1]}."
            )
        random = {} if key is None else {"key": key}  # not every network takes one
        both = jnp.concatenate([x, image.astype(x.dtype)], axis=-1)
        out = self.network(t, both, cond.get("vector"), **random)
        return out[..., : x.shape[-1]]
