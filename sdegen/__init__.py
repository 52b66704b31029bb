"""sdegen: generative models as SDEs and ODEs, in JAX.

One public name per line; networks, data and metrics are in `sdegen.nets`, `sdegen.data`
and `sdegen.metrics`.
"""

from . import coupling as coupling
from . import prediction as prediction
from . import solvers as solvers
from . import times as times
from . import weight as weight
from .base import AbstractBase as AbstractBase
from .base import Gaussian as Gaussian
from .base import StudentT as StudentT
from .check import check as check
from .denoiser import AbstractDenoiser as AbstractDenoiser
from .denoiser import Denoiser as Denoiser
from .denoiser import PosteriorMean as PosteriorMean
from .denoiser import edm_inputs as edm_inputs
from .denoiser import raw_inputs as raw_inputs
from .learn import LearnedGrid as LearnedGrid
from .learn import learn_grid as learn_grid
from .learn import load_grid as load_grid
from .likelihood import bits_per_dim as bits_per_dim
from .likelihood import dequantise as dequantise
from .likelihood import log_likelihood as log_likelihood
from .likelihood import variational_bound as variational_bound
from .loss import denoising_loss as denoising_loss
from .optimizer import AdamW as AdamW
from .optimizer import Lion as Lion
from .path import AbstractPath as AbstractPath
from .processes import DDPM as DDPM
from .processes import EDM as EDM
from .processes import VE as VE
from .processes import VP as VP
from .processes import Cosine as Cosine
from .processes import CustomSDE as CustomSDE
from .processes import FlowMatching as FlowMatching
from .processes import LinearSDE as LinearSDE
from .processes import RectifiedFlow as RectifiedFlow
from .processes import SubVP as SubVP
from .record import Recorder as Recorder
from .reverse import ProbabilityFlow as ProbabilityFlow
from .reverse import ReverseSDE as ReverseSDE
from .reverse import probability_flow as probability_flow
from .reverse import reverse as reverse
from .sample import sample as sample
from .score_error import score_error as score_error
from .score_error import wasserstein_bound as wasserstein_bound
from .sde import AbstractLinearSDE as AbstractLinearSDE
from .sde import AbstractSDE as AbstractSDE
from .simulate import simulate as simulate
from .solvers import Solution as Solution
from .times import Adaptive as Adaptive
from .times import CosineGrid as CosineGrid
from .times import FlowTimeGrid as FlowTimeGrid
from .times import KarrasGrid as KarrasGrid
from .times import LogSNRGrid as LogSNRGrid
from .times import UniformGrid as UniformGrid
from .train import Fit as Fit
from .train import NonFiniteError as NonFiniteError
from .train import TrainState as TrainState
from .train import fit as fit
from .train import init_state as init_state
from .train import train_step as train_step
from .typing import number as number
