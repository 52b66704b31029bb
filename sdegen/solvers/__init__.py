"""Solvers on a rising clock: the fast ones, one file each, and the entry to Diffrax."""

from .adams import ExponentialAdams as ExponentialAdams
from .ddim import DDIM as DDIM
from .ddim import Variance as Variance
from .ddim import analytic_variance as analytic_variance
from .deis import DEIS as DEIS
from .dpm import DPMSolver2 as DPMSolver2
from .dpm import DPMSolverPP as DPMSolverPP
from .dpm_sde import DPMSolverSDE as DPMSolverSDE
from .edm import EDMHeun as EDMHeun
from .er_sde import ERSDE as ERSDE
from .langevin import Langevin as Langevin
from .multistep import Weights as Weights
from .pinned_euler import PinnedEuler as PinnedEuler
from .semilinear import SemilinearTerm as SemilinearTerm
from .solve import Solution as Solution
from .solve import brownian_path as brownian_path
from .solve import evaluations as evaluations
from .solve import solve as solve
from .solver import AbstractSemilinearSolver as AbstractSemilinearSolver
from .sscs import SSCS as SSCS
from .sscs import BackwardTerm as BackwardTerm
from .unipc import UniPC as UniPC
