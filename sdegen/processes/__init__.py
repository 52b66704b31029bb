"""Forward processes, their noise, bases and reversals; what a network predicts on them.

One file per family of processes. `LinearSDE`, `BlockSDE` and `CustomSDE` are made from
the user's coefficients.
"""

from .block_sde import BlockSDE as BlockSDE
from .blurring import Blurring as Blurring
from .cld import CLD as CLD
from .custom_sde import CustomSDE as CustomSDE
from .flow_matching import FlowMatching as FlowMatching
from .flow_matching import RectifiedFlow as RectifiedFlow
from .flow_matching import StraightFlow as StraightFlow
from .interpolant import StochasticInterpolant as StochasticInterpolant
from .learned_schedule import Gamma as Gamma
from .learned_schedule import LearnedSchedule as LearnedSchedule
from .linear_sde import LinearSDE as LinearSDE
from .poisson import GreenFlow as GreenFlow
from .poisson import PoissonFlow as PoissonFlow
from .ve import EDM as EDM
from .ve import VE as VE
from .vp import DDPM as DDPM
from .vp import VP as VP
from .vp import Cosine as Cosine
from .vp import SubVP as SubVP
from .vp import respaced_betas as respaced_betas
from .vp import zero_terminal_snr as zero_terminal_snr
