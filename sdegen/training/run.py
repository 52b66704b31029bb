"""A run: its compiled program, the state it has reached, and where its calls begin."""

import sys
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from ..runs import checkpoint
from ..runs.identity import identify
from .compiled_loop import make_call
from .ema import as_averages
from .optimizer import as_optimizer, like_dtypes
from .step import TrainState, copied, own_loss

_PYTHON = sys.implementation.cache_tag
"""The code of a function is compared between runs of one version of Python alone."""


class Run:
    """The compiled run and the step it has reached, `done`."""

    def __init__(self, model, feed, config, loss):
        self.model, self.feed, self.config = model, feed, config
        self.loss, self.steps = loss or own_loss, config.steps
        self.optimizer = as_optimizer(config.optimizer)
        self.key = jax.random.key(feed.seed)
        self.begin()

    def begin(self):
        """The state of step 0."""
        self.call, self.leaves, self._state = make_call(
            self.model, self.feed, self.config, loss=self.loss
        )
        self.done = 0

    def calls(self, end: int) -> Iterator[tuple[Any, int]]:
        """(data, steps) of each call to step `end`, at multiples of steps_per_call."""
        size, starts = self.config.steps_per_call, [self.done]
        while starts[-1] < end:
            starts.append(min(starts[-1] - starts[-1] % size + size, end))
        counts = [int(count) for count in np.diff(starts)]
        with self.feed.chunks(self.done, iter(counts)) as chunks:
            yield from zip(chunks, counts, strict=False)

    def advance(self, fed, count, flags=None):
        """`count` steps; their metrics, perhaps still being computed."""
        self.leaves, metrics = self.call(self.leaves, fed, flags)
        self.done += count
        return metrics

    def replay(self, step: int) -> None:
        """Advance to `step` without logging."""
        for fed, count in self.calls(step):
            jax.block_until_ready(self.advance(fed, count))

    @property
    def state(self) -> TrainState:
        """The state reached; its buffers are donated to the next call."""
        return self._state(self.leaves)

    def named(self) -> dict[str, Array]:
        """The arrays of the state by their place in it."""
        return checkpoint.named(self.state)

    def averaged(self, copy: bool = False):
        """The model by the first average, or as trained if there is none.

        A copy outlives the next call.
        """
        state = self.state
        trained = like_dtypes((*state.averages, state.trained)[0], state.trained)
        if copy:
            trained = copied(trained)
        return self.model.with_trained(trained)

    def crossed(self, every: int, count: int) -> bool:
        """Whether the last `count` steps reached a multiple of `every`."""
        return self.done // every > (self.done - count) // every

    def flops(self, fed) -> float:
        """Operations of one step on one device, from the lowered program."""
        cost = self.call.lower(self.leaves, fed).cost_analysis() or {}
        # The cost analysis counts the body of a loop once.
        return float(cost.get("flops", 0.0)) * self.config.accumulate

    def identity(self, data):
        """What the numbers of the run depend on, as plain JSON, without the mesh."""
        config, stream, unknown = self.config, self.feed.stream, set()
        own = {"size": len(data)}
        if stream is not None:
            own["stream"] = stream.fingerprint(config.seed)
        else:
            held = [np.ascontiguousarray(a) for a in jax.tree.leaves(self.feed.arrays)]
            own = {"size": np.shape(data), "crc32": [zlib.crc32(a) for a in held]}
        names = ("steps", "batch_size", "steps_per_call", "seed", "augment")
        what = {name: getattr(config, name) for name in (*names, "accumulate")} | {
            "data": own,
            "model": self.model.with_trained(None),
            "optimizer": self.optimizer,
            "loss": self.loss,
            "ema": as_averages(config.ema),
        }
        found = {name: identify(part, unknown) for name, part in what.items()}
        if unknown:
            names = ", ".join(sorted(unknown))
            warnings.warn(
                f"objects of {names} in this call of fit cannot be looked into: the "
                "directory does not notice if they are others when the run goes on.",
                stacklevel=5,
            )
        return found | {"unknown": sorted(unknown), "python": _PYTHON}
