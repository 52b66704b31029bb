"""Processes without a path: their score by simulation, and their way back to data."""

from .losses import implicit_score_loss as implicit_score_loss
from .losses import simulated_score_loss as simulated_score_loss
from .losses import sliced_score_loss as sliced_score_loss
from .score_model import ScoreModel as ScoreModel
from .score_model import SimulatedLaw as SimulatedLaw
