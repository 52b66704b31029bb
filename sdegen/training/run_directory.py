"""What a run keeps in its directory: checkpoints, and snapshots of its averages."""

import json
from pathlib import Path

import jax

from ..models.units import told_units
from ..runs import checkpoint
from ..runs.checkpoint import Checkpoints
from ..runs.recorder import write_whole
from .ema import Power, as_averages


class RunDirectory:
    """The directory of a run and what is saved in it; not `active` without one."""

    def __init__(self, directory, run, data):
        self.active, self.run, self.snapshots = directory is not None, run, None
        self.history: dict[int, float] = {}
        self.stopped = ""
        if not self.active:
            return
        self.place, config = Path(directory).expanduser().absolute(), run.config
        self.save_every = config.save_every or max(run.steps // 20, 1)
        self.snapshot_every = config.snapshot_every or max(run.steps // 32, 1)
        if self.place.exists() and not self.place.is_dir():
            raise ValueError(
                f"directory must be a folder, which need not exist yet, got the file "
                f"{self.place}. Choose another name."
            )
        what = run.identity(data)
        # Where a call ends changes no number, nor where a run ends that does not know.
        free = ["steps_per_call"] + ["steps"] * (not run.optimizer.knows_end)
        kept = {"keep": config.keep, "identity": what, "free": free}
        try:
            self.checkpoints = Checkpoints(self.place / "checkpoints", **kept)
        except ValueError as error:
            if "its steps is" not in str(error):
                raise
            raise ValueError(
                f"{error} The rate of this run falls to zero at its end, so that it "
                "cannot go on after it: begin another run from its weights, "
                f"fit(sdegen.load({str(directory)!r}, model), ..., directory=another), "
                "or train with decay=False, whose runs may be made longer."
            ) from None
        averages = enumerate(as_averages(config.ema))
        self.stds = {i: float(a.std) for i, a in averages if isinstance(a, Power)}
        if self.stds:
            what = what | {"stds": list(self.stds.values())}
            kept |= {"keep": None, "identity": what}
            self.snapshots = Checkpoints(self.place / "averages", **kept)
        self.restore()
        if run.done > run.steps:
            raise ValueError(
                f"the run in {self.place} has reached step {run.done}, and this call "
                f"ends at steps={run.steps}. Give at least {run.done} steps."
            )
        if told := told_units(run.model):
            self._write("units.json", told)
        looks = self._read("validation.json", {}).items()
        self.history = {int(n): loss for n, loss in looks if int(n) <= run.done}
        stopped = self._read("stopped.json", {})
        if stopped and (stopped["step"], stopped["of"]) == (run.done, run.steps):
            # It has ended, and is only read.
            run.steps, self.stopped = run.done, stopped["reason"]

    def _read(self, name, default):
        place = self.place / name
        return json.loads(place.read_text()) if place.exists() else default

    def _write(self, name, value):
        if self.active and jax.process_index() == 0:
            self.place.mkdir(parents=True, exist_ok=True)
            write_whole(self.place / name, json.dumps(value) + "\n")

    def keep_history(self, history):
        """Write the held-out losses, which a resumed run goes on from."""
        self._write("validation.json", history)

    def stop(self, reason):
        """Save the state as the end of the run."""
        if not self.active:
            return
        self.snapshot()
        self.save()
        run = self.run
        self._write(
            "stopped.json", {"step": run.done, "of": run.steps, "reason": reason}
        )

    def restore(self):
        """The last checkpoint, or the state of step 0."""
        found = self.checkpoints.latest(self.run.named())
        if found is not None:
            self.run.done, arrays = found
            self.run.leaves = list(arrays.values())
        elif self.run.done:
            self.run.begin()

    def due(self, count):
        """Whether the last `count` steps end at (a checkpoint, a snapshot)."""
        if not self.active:
            return False, False
        end = self.run.done == self.run.steps
        save = end or self.run.crossed(self.save_every, count)
        snap = self.snapshots is not None and (
            end or self.run.crossed(self.snapshot_every, count)
        )
        return save, snap

    def snapshot(self):
        """Write the power-function averages, if there are any."""
        if self.snapshots is not None:
            averages = self.run.state.averages
            parts = enumerate(checkpoint.named(averages[i]) for i in self.stds)
            flat = {f"{j}{k}": v for j, part in parts for k, v in part.items()}
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
        if self.active:
            self.checkpoints.close()
            if self.snapshots is not None:
                self.snapshots.close()
