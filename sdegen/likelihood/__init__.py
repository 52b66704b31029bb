"""How probable data are under a model: exactly, in bits per dimension, and bounded."""

from .bits import BitsPerDim as BitsPerDim
from .bits import bits_per_dim as bits_per_dim
from .bits import dequantise as dequantise
from .bound import Bound as Bound
from .bound import variational_bound as variational_bound
from .flow import Likelihood as Likelihood
from .flow import log_likelihood as log_likelihood
