"""Models: a network with its process, which `fit` trains and `sample` runs."""

from .augmented import Augmented as Augmented
from .bridge import SchroedingerBridge as SchroedingerBridge
from .denoiser import AbstractDenoiser as AbstractDenoiser
from .denoiser import Denoiser as Denoiser
from .denoiser import PosteriorMean as PosteriorMean
from .denoiser import edm_inputs as edm_inputs
from .denoiser import raw_inputs as raw_inputs
from .generator import AbstractGenerator as AbstractGenerator
from .model import AbstractModel as AbstractModel
from .score import ScoreModel as ScoreModel
from .score import SimulatedPrior as SimulatedPrior
from .vdm import VDM as VDM
from .velocity import AbstractVelocityModel as AbstractVelocityModel
from .velocity import Forward as Forward
from .velocity import VelocityModel as VelocityModel
