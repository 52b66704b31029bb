"""Training: a pure step, a compiled loop for any mesh, and `fit`, which resumes."""

from .compiled_loop import make_call as make_call
from .config import TrainingConfig as TrainingConfig
from .feed import Feed as Feed
from .fit import Fit as Fit
from .fit import NonFiniteError as NonFiniteError
from .fit import fit as fit
from .load import load as load
from .preemption import PREEMPTED as PREEMPTED
from .preemption import Preempted as Preempted
from .step import TrainState as TrainState
from .step import gradients as gradients
from .step import init_state as init_state
from .step import train_step as train_step
