"""Labels as condition vectors."""

import numpy as np
from jaxtyping import Float32


def one_hot(
    labels: int | np.integer | np.ndarray, classes: int
) -> Float32[np.ndarray, "*shape classes"]:
    """1 at the label and 0 elsewhere, as a NumPy array (*shape, classes).

    **Arguments:**
    - `labels`: whole numbers, of any shape.
    - `classes`: the number of classes.

    **Raises:** `ValueError` for a label that is not 0 to classes - 1 (where
    `jax.nn.one_hot` gives zeros).
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
