"""Losses: what training minimises, with its couplings, weights and training times."""

from . import coupling as coupling
from . import times as times
from . import weight as weight
from .batch import Batch as Batch
from .batch import draw_batch as draw_batch
from .bridge import bridge_loss as bridge_loss
from .denoising import denoising_loss as denoising_loss
from .per_sample import batch_index as batch_index
from .per_sample import sample_keys as sample_keys
from .score_matching import implicit_score_loss as implicit_score_loss
from .score_matching import simulated_score_loss as simulated_score_loss
from .score_matching import sliced_score_loss as sliced_score_loss
from .variational import vdm_loss as vdm_loss
from .velocity import velocity_loss as velocity_loss
