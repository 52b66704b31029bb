"""Training: a pure step, a compiled loop for any mesh, and `fit`: no step is lost."""

from .feed import Feed as Feed
from .loop import Fit as Fit
from .loop import NonFiniteError as NonFiniteError
from .loop import fit as fit
from .program import make_call as make_call
from .state import TrainState as TrainState
from .state import gradients as gradients
from .state import init_state as init_state
from .state import train_step as train_step
from .stop import PREEMPTED as PREEMPTED
from .stop import Preempted as Preempted
