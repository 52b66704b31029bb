"""The order of training: the batch of a step is a pure function of (seed, step)."""

import functools

import numpy as np
from jaxtyping import Int


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)


def batch_indices(
    seed: int, step: int, count: int, *, n: int, batch_size: int
) -> Int[np.ndarray, "count batch"]:
    """The rows of the data for some steps, by epochs in random order.

    Batches continue across the end of an epoch, so `batch_size` may exceed `n`.

    **Arguments:**
    - `seed`: of the order.
    - `step`, `count`: the first step and the number of steps.
    - `n`: rows of the data.
    - `batch_size`: rows of a batch.
    """
    start = step * batch_size
    epochs, places = np.divmod(np.arange(start, start + count * batch_size), n)
    out = np.empty(epochs.shape, np.int32)
    for epoch in np.unique(epochs).tolist():
        out[epochs == epoch] = _permutation(seed, epoch, n)[places[epochs == epoch]]
    return out.reshape(count, batch_size)
