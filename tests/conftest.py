"""One machine for every test: eight simulated devices, float64, checked signatures."""

import collections
import gc
import itertools
import os
import shutil
from pathlib import Path

# Before JAX starts. NPROC: with few cores, collectives of un-awaited steps on simulated
# devices can wait for each other for ever; a larger thread pool cures it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Three quarters of the suite's time is compilation of programs that run for
# milliseconds: compile them quickly rather than well, in the scripts' processes too.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests them as a user's JAX compiles them.
# (Not with --xla_cpu_use_fusion_emitters=false as well, which would be quicker still:
# the two together give wrong numbers, jaxlib 0.10.2.)
QUICK = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0"
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# What one process has compiled, the others, the scripts, and the next run on this
# machine need not compile again: that is most of the suite's time.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = Path(__file__).parent.parent / ".pytest_cache" / "programs"
    if sum(file.stat().st_size for file in programs.glob("*")) > 4e9:
        shutil.rmtree(programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)
jaxtyping.install_import_hook("sdegen", "beartype.beartype")


LONG = (
    "experiments",
    "resume",
    "check",
    "likelihood",
    "sample",
    "nets",
    "mesh",
    "coupling",
    "processes",
    "momentum",
)
"""Files that take minutes, the longest first."""


# Tracing makes millions of small objects and hardly a cycle: look for those seldom.
gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(items):
    """Start with the long files, so that no process works on one of them alone."""
    gc.collect()
    gc.freeze()
    first = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: first.get(item.path.stem, len(LONG)))


def pytest_terminal_summary(terminalreporter):
    """Say where the time went: the ten slowest files, set-up and tear-down included."""
    spent = collections.Counter()
    for report in itertools.chain(*terminalreporter.stats.values()):
        if hasattr(report, "duration") and hasattr(report, "nodeid"):
            spent[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section(f"{sum(spent.values()):.0f} s of tests, the slowest files")
    for file, seconds in spent.most_common(10):
        terminalreporter.line(f"{seconds:7.1f} s  {file}")


@pytest.fixture(autouse=True)
def room_for_programs():
    """Forget compiled programs before the system's limit on memory maps (65,530).

    Every program on a CPU maps memory of its own; beyond the limit the compiler
    crashes.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 45_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def well_compiled():
    """Compile well for one test, which runs for longer than it compiles."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", QUICK)


@pytest.fixture
def float32():
    """Run a test in JAX's default precision, as a user does."""
    with jax.enable_x64(False):
        yield
