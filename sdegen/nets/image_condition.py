"""A condition that is itself an image: channels beside those of x."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..typing import DropoutKey, PyTree, Time


class ImageConditioned(eqx.Module):
    """A network that is shown an image beside x, and a vector if it takes one.

    **Arguments:** `network`, made for samples of shape (h, w, c + k): c channels of x,
    k of the condition. `cond` is a dictionary: "image", (batch, h, w, k), and "vector",
    what the network inside is conditioned on, if anything. Saharia et al. 2022,
    "Palette", section 3. Of what the network returns the first c channels count.
    """

    network: Any

    def __call__(
        self,
        t: Time,
        x: Float[Array, "batch ... c"],
        cond: PyTree = None,
        *,
        key: DropoutKey | None = None,
    ) -> Float[Array, "batch ... c"]:
        """The prediction for x, given the image."""
        image = cond.get("image") if isinstance(cond, dict) else None
        if image is None or not set(cond) <= {"image", "vector"}:
            came = sorted(cond) if isinstance(cond, dict) else type(cond).__name__
            raise ValueError(
                'the condition must be a dictionary with "image", and "vector" for a '
                f"network that takes one, got {came}."
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
