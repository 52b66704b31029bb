"""Which end of a path goes with which: functions (key, x0, x1) -> (x0, x1)."""

from ..._compat import renamed as _renamed
from .costs import cost_matrix as cost_matrix
from .entropic_ot import EntropicOT as EntropicOT
from .exact_ot import ExactOT as ExactOT
from .pairs import PairedData as PairedData
from .pairs import Pairs as Pairs
from .pairs import couple as couple
from .pairs import independent as independent
from .pairs import paired as paired

__getattr__ = _renamed(__name__)
