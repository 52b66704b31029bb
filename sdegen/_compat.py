"""What may change under the package: private parts of other libraries, and old names.

tests/test_compat.py tries each: a new release of a library breaks one file.
"""

import importlib
import importlib.metadata
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils as multihost_utils
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

try:
    __version__ = importlib.metadata.version("sdegen")
except importlib.metadata.PackageNotFoundError:  # a clone that is not installed
    __version__ = "0+unknown"

# -- optional packages -----------------------------------------------------------------


class MissingPackageError(ImportError):
    """An optional package is not installed; the message says how to get it."""


def need(
    module: str, what: str, *, extra: str = "", package: str = "", hint: str = ""
) -> Any:
    """Import `module`, or say that `what` needs the `package` (default: its top)."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        source = f"'sdegen[{extra}]'" if extra else package
        text = f"{what} needs {package}, which is not installed: pip install {source}."
        raise MissingPackageError(f"{text} {hint}".rstrip()) from error


# -- JAX -------------------------------------------------------------------------------


def bilinear_primitive(
    name: str,
    function: Callable,
    transposes: tuple[Callable, Callable],
    batch: Callable,
) -> Callable:
    """`function(x, w)`, bilinear, as one JAX primitive.

    `transposes` are f(dy, x, w) for x and for w, `batch` is the rule for `vmap`.
    """
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(function))
    # from (n, ..., inputs) and (..., inputs, outputs)
    primitive.def_abstract_eval(
        lambda x, w: x.update(shape=x.shape[:-1] + w.shape[-1:])
    )
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    ad.defbilinear(primitive, *transposes)
    batching.primitive_batchers[primitive] = batch
    return primitive.bind


# -- Orbax -----------------------------------------------------------------------------


def orbax() -> Any:
    """`orbax.checkpoint`, imported when it is first used: it costs half a second."""
    return importlib.import_module("orbax.checkpoint")


def orbax_metadata(checkpoint: Path) -> str:
    """The JSON text saved as the item "meta" of a checkpoint, by Orbax's layout."""
    return (checkpoint / "meta" / "metadata").read_text()


# -- Optuna ----------------------------------------------------------------------------


def trial_id(trial: Any) -> int:
    """The number by which an Optuna storage knows a trial."""
    return trial._trial_id


def requeue(study: Any, storage: Any, trial: Any) -> None:
    """Enqueue a copy of an Optuna trial that is given back."""
    storage.get_heartbeat_stale_trial_callback()(study, trial)


# -- old names -------------------------------------------------------------------------

_FILES = {
    "checks": "tilt:guidance",
    "guidance": "particles",
    "likelihood": "angle:coordinates",
    "losses": "loss:denoising vdm:variational",
    "losses.coupling": "sinkhorn",
    "models": "augmented bridge denoiser generator velocity",
    "processes": "base:noise basis block:momentum brownian path radial:noise "
    "sde track:interpolant",
    "runs": "checkpoint pictures:plots record:recorder report speed:throughput writers",
    "sampling": "generate:drive transition:ancestral",
    "training": "average:ema learn:learned_grid optimizer posthoc_ema",
}
"""For each room the files that lay at the top before, as old:new."""
_GRIDS = "Adaptive CosineGrid FlowTimeGrid KarrasGrid LogSNRGrid UniformGrid"
_RENAMED = {
    "sdegen": {
        "AbstractBase": "sdegen.AbstractNoise",
        "AbstractTrack": "sdegen.AbstractInterpolant",
        "SimulatedLaw": "sdegen.SimulatedPrior",
        "Upward": "sdegen.Forward",
        "nonlinear": "sdegen.models",
        "train": "sdegen.training",
        "udm": "sdegen.corruption",
    }
    | {
        old: f"sdegen.{room}.{new or old}"
        for room, files in _FILES.items()
        for old, _, new in (file.partition(":") for file in files.split())
    },
    "sdegen.nets": {
        "Beside": "sdegen.nets.ImageConditioned",
        "Tails": "sdegen.nets.HeavyTailed",
    }
    | {
        name.title(): f"sdegen.nets.{name}Config"
        for name in ("ADM", "DDPMpp", "DiT", "EDM2", "MLP", "NCSNpp", "UNet")
    },
    "sdegen.corruption": {
        "Chain": "sdegen.Solution",
        "Hot": "sdegen.corruption.Gaussian",
    },
    "sdegen.losses.coupling": {"Ends": "sdegen.coupling.PairedData"},
    "sdegen.losses.times": {"Nodes": "sdegen.times.EulerTimes"}
    | {name: f"sdegen.{name}" for name in _GRIDS.split()}
    | {name: f"sdegen.solvers.grids.{name}" for name in ("AbstractGrid", "Grid")},
    "sdegen.processes.prediction": {
        "Kind": "sdegen.prediction.Prediction",
        "ends": "sdegen.prediction.posterior_means",
    },
}
_ALIASES = {"sdegen.udm": "sdegen.corruption"}
"""Modules that are still there under the old name, until the next release."""


def renamed(module: str) -> Callable[[str], Any]:
    """A module's `__getattr__` (PEP 562), which knows the names of the last version."""

    def get(name: str) -> Any:
        old, new = f"{module}.{name}", _RENAMED[module].get(name)
        if old in _ALIASES:
            text = f"{old} is now {new}; the old name goes with the next release."
            warnings.warn(text, DeprecationWarning, stacklevel=2)
            return importlib.import_module(_ALIASES[old])
        text = f"{old} is now {new}."
        if new is None:
            text = f"module {module!r} has no attribute {name!r}"
        raise AttributeError(text, name=name, obj=sys.modules[module])

    return get
