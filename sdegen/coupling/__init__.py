"""Which end of a path goes with which: functions (key, x0, x1) -> (x0, x1)."""

from .entropic import EntropicOT as EntropicOT
from .exact import ExactOT as ExactOT
from .pairs import Ends as Ends
from .pairs import Pairs as Pairs
from .pairs import couple as couple
from .pairs import independent as independent
from .pairs import paired as paired
from .transport import cost_matrix as cost_matrix
