"""Several processes, one to a host, that are one worker: only process 0 does I/O."""

import json
from typing import Any

import jax
import numpy as np

from .._compat import multihost_utils


def broadcast(value: Any) -> Any:
    """Process 0's `value`, plain JSON, on every process."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    # The same shape everywhere: only process 0 knows the text.
    text = data if jax.process_index() == 0 else np.zeros(size, np.uint8)
    text = np.asarray(multihost_utils.broadcast_one_to_all(text)).astype(np.uint8)
    return json.loads(text.tobytes().decode())


def any_process(flag: bool) -> bool:
    """Whether `flag` is set on any process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.int32(flag)).any())
