"""Which noise goes with which data: functions (key, x0, x1) -> (x0, x1) on batches.

`x0` is a batch of data, `x1` a batch of draws from the other end (the noise z, unless
the path runs between two data sets). A coupling permutes or pairs them; the marginals
of both stay what they were, so every coupling trains a correct flow.
"""

from jaxtyping import Array, Float

from .typing import RandomKey


def independent(
    key: RandomKey, x0: Float[Array, "batch ..."], x1: Float[Array, "batch ..."]
) -> tuple[Float[Array, "batch ..."], Float[Array, "batch ..."]]:
    """The product law: x1 is drawn without regard to x0, so nothing needs to move."""
    return x0, x1
