"""The loss on held-out data while a model trains, and when training ends by it.

Every look uses the same keys, so the same noise and times: two looks differ by what was
learnt alone.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..losses.coupling.pairs import split_aux
from ..mesh import batch_sharding, place, replicated
from .feed import as_float, check_data

_APART = 2**31 - 3  # of the keys of the steps, which no run has so many of


class Validation:
    """Looks at the held-out loss of a run, in `history` by their steps.

    **Arguments:**
    - `given`: data, or a pair (data, cond), or None for no looks.
    - `run`: the run, whose averaged model is looked at.
    - `history`: the looks of the run before it was stopped.
    """

    def __init__(self, given: Any, run: Any, history: dict[int, float]):
        self.run, self.config, self.history = run, run.config, history
        self.arrays, config = None, run.config
        if given is None:
            if config.patience is not None or config.stop is not None:
                raise ValueError(
                    "patience and stop end training by the held-out loss, and there "
                    "are no held-out data: give fit validation=data."
                )
            return
        x, cond = given if isinstance(given, tuple) else (given, None)
        try:
            check_data(x, cond)
        except ValueError as error:
            raise ValueError(f"the data of validation: {error}") from None
        self.arrays = (jnp.asarray(x), jax.tree.map(jnp.asarray, cond))
        feed, shape = run.feed, self.arrays[0].shape[1:]
        own = feed.arrays[0].shape[1:] if feed.stream is None else feed.stream.shape
        if own != shape:
            raise ValueError(
                f"validation needs samples of the shape of the data, {own}, got "
                f"{shape}. Give samples of the same kind."
            )
        self.every = config.validate_every or max(run.steps // 20, 1)

    def due(self, count: int) -> bool:
        """Whether the last `count` steps end at a look."""
        run = self.run
        return self.arrays is not None and (
            run.crossed(self.every, count) or run.done == run.steps
        )

    def look(self) -> None:
        """Note the loss of the averaged model on all held-out data."""
        run, total = self.run, 0.0
        key = jax.random.fold_in(jax.random.key(self.config.seed), _APART)
        model, size, n = run.averaged(), run.feed.batch_size, len(self.arrays[0])
        for i, first in enumerate(range(0, n, size)):
            rows = slice(first, min(first + size, n))
            x, cond = self._placed(jax.tree.map(lambda a, r=rows: a[r], self.arrays))
            value = _loss(model, run.loss, jax.random.fold_in(key, i), x, cond)
            total += value * (rows.stop - rows.start) / n
        self.history[run.done] = float(total)

    def _placed(self, batch):
        """A batch split over the mesh if it divides it, whole if not."""
        mesh = self.run.feed.mesh
        if mesh is None:
            return batch
        split = batch_sharding(mesh)
        even = len(batch[0]) % len(split.device_set) == 0
        sharding = split if even else replicated(mesh)
        return place(batch, jax.tree.map(lambda _: sharding, batch))

    def ended(self) -> str:
        """Why training ends at this step by the held-out loss; "" if it does not."""
        steps, losses = list(self.history), list(self.history.values())
        patience, stop = self.config.patience, self.config.stop
        if self.run.done not in self.history:
            return ""
        late = len(losses) - 1 - int(np.argmin(losses))
        if patience is not None and late >= patience:
            best = steps[int(np.argmin(losses))]
            return f"the held-out loss was least at step {best}, {late} looks before"
        return "by `stop`" if stop is not None and stop(dict(self.history)) else ""


@eqx.filter_jit
def _loss(model, loss, key, x, cond):
    return split_aux(loss(model, key, as_float(x), cond, axis_name=None))[0]
