"""The 1,797 real 8x8 scans of handwritten digits that scikit-learn carries."""

import numpy as np
from jaxtyping import Float, Int


def digits(
    seed: int = 0,
) -> tuple[
    tuple[Float[np.ndarray, "train 8 8 1"], Int[np.ndarray, " train"]],
    tuple[Float[np.ndarray, "held 8 8 1"], Int[np.ndarray, " held"]],
]:
    """((train images, labels), (held-out images, labels)): halves of a shuffled set.

    Pixels are scaled to [-1, 1]; labels are 0 to 9. UCI "Optical recognition of
    handwritten digits" test set, by E. Alpaydin and C. Kaynak (CC BY 4.0).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed: "
            "pip install scikit-learn."
        ) from error
    scans = load_digits()
    order = np.random.default_rng(seed).permutation(len(scans.images))
    images = (scans.images[order, :, :, None] / 8.0 - 1.0).astype(np.float32)
    labels = scans.target[order].astype(np.int32)
    half = len(images) // 2
    return (images[:half], labels[:half]), (images[half:], labels[half:])
