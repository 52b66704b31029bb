"""Sweeps: many trials as one program, and many programs over a cluster."""

from .halving import Halving as Halving
from .results import Results as Results
from .run import Sweep as Sweep
from .run import run as run
from .run import sweep as sweep
from .space import Between as Between
from .space import Static as Static
from .space import override as override
from .trial import Training as Training
from .worker import work as work
