"""Labels as networks take them."""

import numpy as np
from jaxtyping import Float32


def one_hot(
    labels: int | np.integer | np.ndarray, classes: int
) -> Float32[np.ndarray, "*shape classes"]:
    """1 at the label and 0 elsewhere, on the host; (...,) becomes (..., classes).

    Raises a ValueError for a label outside 0 to classes - 1 (`jax.nn.one_hot` gives
    zeros there).
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or classes < 1:
        raise ValueError(
            f"one_hot takes integer labels and classes >= 1, got {labels.dtype} and "
            f"{classes}."
        )
    if labels.size and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(
            f"labels must be 0 to {classes - 1}, got {labels.min()} to {labels.max()}."
        )
    return np.equal(labels[..., None], np.arange(classes)).astype(np.float32)
