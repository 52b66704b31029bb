"""A run: its compiled program, the state it has reached, and where its calls begin."""

import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..data.stream import AbstractStream
from ..runs import checkpoint
from ..runs.recorder import describe
from .compiled_loop import make_call
from .step import TrainState


class Run:
    """The compiled run and where it stands."""

    def __init__(self, model, feed, *, steps, steps_per_call, options):
        self.model, self.feed, self.options = model, feed, options
        self.steps, self.steps_per_call = steps, steps_per_call
        self.done = 0
        self.begin()

    def begin(self):
        """The state of step 0."""
        self.call, self.leaves, self.structure = make_call(
            self.model, self.feed, steps=self.steps, **self.options
        )
        self.done = 0

    def counts(self, start: int, end: int) -> Iterator[int]:
        """Steps of each call from `start` to `end`, at multiples of steps_per_call."""
        while start < end:
            count = min(self.steps_per_call - start % self.steps_per_call, end - start)
            yield count
            start += count

    def advance(self, fed, count, aux=None):
        """`count` steps; their metrics, perhaps still under way."""
        self.leaves, metrics = self.call(self.leaves, fed, aux)
        self.done += count
        return metrics

    def replay(self, step: int) -> None:
        """On from where the run stands to `step`, without a word."""
        with self.feed.chunks(self.done, self.counts(self.done, step)) as chunks:
            for fed, count in zip(chunks, self.counts(self.done, step), strict=False):
                jax.block_until_ready(self.advance(fed, count))

    @property
    def state(self) -> TrainState:
        """The state reached; its buffers are donated to the next call."""
        return jax.tree.unflatten(self.structure, self.leaves)

    def named(self) -> dict[str, Array]:
        """The arrays of the state by their place in it."""
        return checkpoint.named(self.state)

    def averaged(self, copy: bool = False):
        """The model with the first average as what training changes.

        The next call takes the arrays: a copy outlives it.
        """
        trained = self.state.averages[0]
        if copy:
            trained = jax.tree.map(jnp.copy, trained)
        return self.model.with_trained(trained)

    def crossed(self, every: int, count: int) -> bool:
        """Whether the last `count` steps reached a multiple of `every`."""
        return self.done // every > (self.done - count) // every

    def flops(self, fed) -> float:
        """Operations of one step on one device, from the lowered program."""
        cost = self.call.lower(self.leaves, fed).cost_analysis() or {}
        # The cost analysis counts the body of a loop once.
        return float(cost.get("flops", 0.0)) * self.options["accumulate"]


def identify(run, data):
    """What the numbers of a run depend on, as plain JSON; the mesh is not in it."""
    options = run.options
    size = np.shape(data) if not isinstance(data, AbstractStream) else len(data)
    what = {
        "steps": run.steps,
        "batch_size": run.feed.batch_size,
        "steps_per_call": run.steps_per_call,
        "seed": run.feed.seed,
        "data": {"size": size},
        "model": run.model.with_trained(None),
    }
    if run.feed.stream is None:
        held = [np.asarray(a) for a in jax.tree.leaves(run.feed.arrays)]
        what["data"]["crc32"] = [zlib.crc32(np.ascontiguousarray(a)) for a in held]
    return describe(what | options)
