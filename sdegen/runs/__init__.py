"""What a run leaves on disk: rows, checkpoints, plots and reports."""

from . import checkpoint as checkpoint
from . import plots as plots
from . import report as report
from . import throughput as throughput
from . import writers as writers
from .recorder import Recorder as Recorder
from .recorder import table as table
