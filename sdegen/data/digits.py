"""The 1,797 real 8x8 scans of handwritten digits that come with scikit-learn."""

from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Int

from .._compat import need

Half: TypeAlias = tuple[Float[np.ndarray, "_ 8 8 1"], Int[np.ndarray, " _"]]


def digits(seed: int = 0) -> tuple[Half, Half]:
    """The halves of the shuffled set, to train with and to test with.

    From UCI "Optical recognition of handwritten digits", by E. Alpaydin and C. Kaynak
    (CC BY 4.0).

    **Arguments:**
    - `seed`: of the order before it is halved, default 0.

    **Returns:** two pairs (images, labels), with pixels in [-1, 1] and labels 0 to 9.
    """
    module, package = "sklearn.datasets", "scikit-learn"
    scans = need(module, "digits()", extra="data", package=package).load_digits()
    order = np.random.default_rng(seed).permutation(len(scans.images))
    images = (scans.images[order, :, :, None] / 8.0 - 1.0).astype(np.float32)
    labels = scans.target[order].astype(np.int32)
    half = len(images) // 2
    return (images[:half], labels[:half]), (images[half:], labels[half:])
