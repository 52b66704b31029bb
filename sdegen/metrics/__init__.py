"""Distances of distributions, from samples: docs/metrics.md has cost, bias and use."""

from .frechet import frechet as frechet
from .gaussian import Moments as Moments
from .gaussian import fitted_gaussian_w2 as fitted_gaussian_w2
from .gaussian import gaussian_w2 as gaussian_w2
from .kernel import energy_distance as energy_distance
from .kernel import mmd2 as mmd2
from .ks import KS as KS
from .ks import ks as ks
from .neighbours import DensityCoverage as DensityCoverage
from .neighbours import PrecisionRecall as PrecisionRecall
from .neighbours import density_coverage as density_coverage
from .neighbours import nearest as nearest
from .neighbours import precision_recall as precision_recall
from .path_energy import PathEnergy as PathEnergy
from .path_energy import path_energy as path_energy
from .path_energy import straightness as straightness
from .sinkhorn_divergence import SinkhornDivergence as SinkhornDivergence
from .sinkhorn_divergence import sinkhorn_divergence as sinkhorn_divergence
from .sliced import Estimate as Estimate
from .sliced import sliced_w2 as sliced_w2
from .wasserstein import Transport as Transport
from .wasserstein import transport as transport
from .wasserstein import w1 as w1
from .wasserstein import w2 as w2
