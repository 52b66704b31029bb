"""How fast a run is: operations against the device's peak, and a profiler's trace."""

import time
from pathlib import Path

import jax

_PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 836e12,
    "NVIDIA B200": 2250e12,
}
"""Dense bfloat16 operations per second of one device, by its data sheet."""


def peak_flops(kind: str | None = None) -> float | None:
    """The bfloat16 peak of a device of `kind` (default: this machine's), or None."""
    kind = jax.devices()[0].device_kind if kind is None else kind
    names = [name for name in _PEAK if kind.startswith(name)]
    return _PEAK[max(names, key=len)] if names else None


class Speedometer:
    """Rates of a run since its first call, whose compilation does not count.

    **Arguments:**
    - `batch_size`: samples to a step.
    - `flops`: operations of one step on one device as compiled, with recomputation.
    """

    def __init__(self, batch_size: int, flops: float | None = None):
        self.batch_size, self.flops = batch_size, flops
        self._began, self._steps = None, 0

    def passed(self, steps: int) -> dict[str, float]:
        """Rates after `steps` more steps, empty at the first call."""
        now = time.perf_counter()
        if self._began is None:
            self._began = now
            return {}
        self._steps += steps
        rate = self._steps / max(now - self._began, 1e-9)
        rates = {"steps_per_second": rate, "samples_per_second": rate * self.batch_size}
        if self.flops:
            rates["tflops_per_device"] = rate * self.flops / 1e12
            peak = peak_flops()
            if peak:
                rates["utilisation"] = rate * self.flops / peak
        return rates


class Trace:
    """A profiler's trace of the third to the fifth call, in `directory`."""

    def __init__(self, directory):
        self._directory, self._calls, self._on = directory, 0, False
        if directory is not None:
            self._directory = Path(directory).expanduser()

    def __enter__(self):
        return self

    def call(self):
        """One more call begins."""
        self._calls += 1
        if self._directory is not None and self._calls == 3:
            jax.profiler.start_trace(str(self._directory))
            self._on = True
        if self._on and self._calls == 6:
            self.__exit__()

    def __exit__(self, *error):
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
