"""What a run keeps in its directory: checkpoints, and snapshots of its averages."""

from pathlib import Path

from ..runs import checkpoint
from ..runs.checkpoint import Checkpoints
from .ema import Power
from .run import identify


class Disk:
    """What a run keeps in its directory: checkpoints, snapshots of averages."""

    def __init__(self, directory, run, data, keep, save_every, snapshot_every):
        self.here = directory is not None
        self.run = run
        if not self.here:
            return
        self.directory = Path(directory).absolute()
        self.save_every = save_every or max(run.steps // 20, 1)
        identity = identify(run, data)
        self.checkpoints = Checkpoints(
            self.directory / "checkpoints", keep=keep, identity=identity
        )
        power = [
            (i, float(a.std))
            for i, a in enumerate(run.options["ema"])
            if isinstance(a, Power)
        ]
        self.stds, self.snapshots = dict(power), None
        if power:
            self.snapshot_every = snapshot_every or max(run.steps // 32, 1)
            self.snapshots = Checkpoints(
                self.directory / "averages",
                keep=None,
                identity=identity | {"stds": [std for _, std in power]},
            )
        self.restore()

    def restore(self):
        """The last checkpoint, or the state of step 0."""
        found = self.checkpoints.latest(self.run.named())
        if found is not None:
            self.run.leaves = list(found.arrays.values())
            self.run.done = found.step
        elif self.run.done:
            self.run.begin()

    def due(self, count):
        """Whether this call ends at a checkpoint, or at a snapshot."""
        if not self.here:
            return False, False
        end = self.run.done == self.run.steps
        save = end or self.run.crossed(self.save_every, count)
        snap = self.snapshots is not None and (
            end or self.run.crossed(self.snapshot_every, count)
        )
        return save, snap

    def snapshot(self):
        """Write the power-function averages."""
        averages = self.run.state.averages
        arrays = {i: checkpoint.named(averages[i]) for i in self.stds}
        flat = {
            f"{j}{k}": v for j, i in enumerate(arrays) for k, v in arrays[i].items()
        }
        self.snapshots.save(self.run.done, flat)

    def save(self):
        """Write a checkpoint."""
        self.checkpoints.save(self.run.done, self.run.named())

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        # What was begun is finished, also when the run ends by an exception.
        try:
            self.close()
        except OSError as failed:
            if error is None:
                raise
            error.add_note(str(failed))

    def close(self):
        """Wait for what is being written, and close."""
        if self.here:
            self.checkpoints.close()
            if self.snapshots is not None:
                self.snapshots.close()
