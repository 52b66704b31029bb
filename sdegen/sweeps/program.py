"""Trials side by side as one compiled program, the trial axis split over a mesh.

Under `shard_map` each device works on its own trials, in `vmap` over as many as `lanes`
says and one group after the other; nothing is communicated.
"""

import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ..data.batches import batch_indices
from ..mesh import place, replicated, to_host
from ..training.compiled_loop import advance, begin
from ..training.optimizer import like_dtypes
from ..typing import PyTree
from .space import Point

CPU_LANES = 4
"""Few enough for a CPU's caches: from 1.4 times the steps of one, to as many."""
_SHARE = 0.8
"""Share of a device's memory that a program may take."""


class TooLargeError(ValueError):
    """So many trials do not fit into the memory of a device."""


class Program:
    """`width` trials as one program.

    **Arguments:**
    - `trial`: (key, values) -> a `Training` or metrics, on tracers.
    - `points`: at least one, all of the same static values.
    - `mesh`: the trials are split over all of its devices; one device by default.
    - `lanes`: trials side by side on a device, the others after them. By default all on
      an accelerator, `CPU_LANES` on a CPU.
    """

    def __init__(
        self,
        trial: Callable,
        points: Sequence[Point],
        mesh: Mesh | None = None,
        lanes: int | None = None,
    ):
        self.trial, self.points, self.mesh = trial, list(points), mesh
        self.devices = 1 if mesh is None else mesh.devices.size
        one = jax.devices() if mesh is None else mesh.devices.ravel()
        self.width = -(-len(self.points) // self.devices) * self.devices
        self.lanes = lanes or (CPU_LANES if one[0].platform == "cpu" else self.width)
        self.spec: Any = None
        self.static: Any = None
        self.feed: Any = None
        self.seeds, self.inputs = self._inputs()
        self._compiled: dict[Any, Any] = {}

    def _inputs(self):
        """Seeds of every trial, the last one repeated up to the width; with values."""
        filled = self.points + [self.points[-1]] * (self.width - len(self.points))
        seeds, values = [p.seed for p in filled], {}
        for name in self.points[0].values:
            column = np.array([p.values[name] for p in filled])
            real = column.dtype.kind == "f"
            values[name] = column.astype(jnp.result_type(float) if real else np.int32)
        return seeds, self._split((np.array(seeds, np.uint32), values))

    def _split(self, tree: PyTree) -> PyTree:
        """Host arrays with a leading axis of trials, laid out on the mesh."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        sharding = _sharding(self.mesh)
        return place(tree, jax.tree.map(lambda _: sharding, tree))

    def _each(self, function: Callable) -> Callable:
        """`function(tree, shared)` of one trial, for all: (trees, shared) -> trees."""

        def local(trees, shared):
            def one(tree):
                return function(tree, shared)

            here = len(jax.tree.leaves(trees)[0])
            if self.lanes >= here:
                return jax.vmap(one)(trees)
            # A divisor: a smaller last group would be compiled as well.
            lanes = max(n for n in range(1, self.lanes + 1) if here % n == 0)
            return jax.lax.map(one, trees, batch_size=None if lanes == 1 else lanes)

        if self.mesh is None:
            return local
        split = P(self.mesh.axis_names)
        options = {"in_specs": (split, P()), "out_specs": split, "check_vma": False}
        return jax.shard_map(local, mesh=self.mesh, **options)

    def evaluate(self) -> PyTree:
        """The metrics of trials that return them, one row for each, on the host."""

        def one(inputs, _):
            return self.trial(jax.random.key(inputs[0]), inputs[1])

        return self.to_host(self._run("trial", one, self.inputs, ()))

    def begin(self) -> list:
        """The states of step 0, of trials that return a Training."""

        def one(inputs, _):
            key = jax.random.key(inputs[0])
            spec = self.trial(key, inputs[1])
            leaves, extras, static = begin(spec.model, key, spec.config, spec.loss)
            # What a trace may leave behind: nothing of its arrays.
            self.spec = SimpleNamespace(
                steps=spec.config.steps,
                steps_per_call=spec.config.steps_per_call,
                batch_size=spec.config.batch_size,
                measure=spec.measure,
                judged=spec.evaluate is not None,
            )
            self.static, self.feed = static, spec.feed
            return leaves, extras

        leaves, self.extras = self._run("begin", one, self.inputs, ())
        feed = self.feed()  # outside of the trace
        self.length, self.held = feed.length, feed.arrays
        if self.mesh is not None:
            whole = jax.tree.map(lambda _: replicated(self.mesh), self.held)
            self.held = place(self.held, whole)
        return leaves

    def rows(self, step: int, count: int) -> Any:
        """The rows of the data for `count` steps of every trial, after `step`."""
        sizes = {"n": self.length, "batch_size": self.spec.batch_size}
        of = {seed: batch_indices(seed, step, count, **sizes) for seed in {*self.seeds}}
        return self._split(np.stack([of[seed] for seed in self.seeds]))

    def advance(self, leaves: list, step: int, count: int) -> tuple[list, Any]:
        """`count` steps of every trial: (leaves, metrics (width, count))."""

        def one(tree, held):
            leaves, extras, fed = tree
            return advance(leaves, (extras, held), fed, self.static)

        trees = (leaves, self.extras, self.rows(step, count))
        return self._run(f"advance {count}", one, trees, self.held, donate=1)

    def judge(self, leaves: list) -> PyTree:
        """What `evaluate` of every trial's Training gives, on the host."""
        if not self.spec.judged:
            return {}

        def one(tree, _):
            leaves, (seed, values) = tree
            key = jax.random.key(seed)
            spec = self.trial(key, values)
            state = self.static.state(leaves)
            average = like_dtypes((*state.averages, state.trained)[0], state.trained)
            full = spec.model.with_trained(average)
            # Apart from the keys of the steps.
            return spec.evaluate(jax.random.fold_in(key, 2**31 - 2), full)

        return self.to_host(self._run("judge", one, (leaves, self.inputs), ()))

    def keep(self, leaves: list, chosen: Sequence[int]) -> tuple["Program", list]:
        """A narrower program of the trials at the places `chosen`, and their states."""
        points = [self.points[i] for i in chosen]
        program = Program(self.trial, points, self.mesh, self.lanes)
        program.spec, program.static = self.spec, self.static
        program.length, program.held = self.length, self.held
        index = np.pad(chosen, (0, program.width - len(chosen)), mode="edge")
        options = {} if self.mesh is None else {"out_shardings": _sharding(self.mesh)}
        take = jax.jit(lambda t: jax.tree.map(lambda a: a[index], t), **options)
        leaves, program.extras = take((leaves, self.extras))
        return program, leaves

    def to_host(self, tree: PyTree) -> PyTree:
        """Arrays of all trials, whole, on every process, without the repeated ones."""
        return jax.tree.map(lambda a: to_host(a)[: len(self.points)], tree)

    def _run(self, name, function, trees, shared, donate=0):
        """`function` for every trial, compiled once, in lanes that the memory holds.

        The first `donate` of `trees` are donated.
        """
        donated, others = trees[:donate], trees[donate:]
        shapes = tuple(np.shape(a) for a in jax.tree.leaves(trees))
        if (name, shapes) not in self._compiled:
            self._compiled[name, shapes] = self._compile(
                function, donated, others, shared
            )
        return self._compiled[name, shapes](donated, others, shared)

    def _compile(self, function, *arguments):
        def run(donated, others, shared):
            return self._each(function)((*donated, *others), shared)

        while True:
            # A new function each time: the lanes are baked into the trace.
            jitted = jax.jit(lambda *a: run(*a), donate_argnums=(0,))
            compiled = jitted.lower(*arguments).compile()
            needed, there = _memory(compiled), self._memory_there()
            if needed <= _SHARE * there:
                return compiled
            here = self.width // self.devices
            if min(self.lanes, here) == 1:
                raise TooLargeError(
                    f"{here} trials on a device need {needed / 2**30:.3g} GiB and it "
                    f"has {there / 2**30:.3g}. Take fewer at a time: chunk="
                    f"{max(self.width // 2, 1)}."
                )
            self.lanes = -(-min(self.lanes, here) // 2)

    def _memory_there(self):
        """Bytes of one device; CPU devices share the machine's."""
        device = jax.local_devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if limit is None:
            pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            limit = pages / jax.local_device_count()
        return limit


def _sharding(mesh):
    return NamedSharding(mesh, P(mesh.axis_names))


def _memory(compiled) -> float:
    """Bytes that a program needs on a device, by its compiler."""
    stats = compiled.memory_analysis()
    if stats is None:
        return 0.0
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes
    return float(held + stats.temp_size_in_bytes - stats.alias_size_in_bytes)
