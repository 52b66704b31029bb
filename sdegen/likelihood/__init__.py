"""How probable data are under a model: exactly, in bits per dimension, and bounded."""

from .bits_per_dim import BitsPerDim as BitsPerDim
from .bits_per_dim import bits_per_dim as bits_per_dim
from .bits_per_dim import dequantise as dequantise
from .log_likelihood import Likelihood as Likelihood
from .log_likelihood import log_likelihood as log_likelihood
from .variational_bound import Bound as Bound
from .variational_bound import variational_bound as variational_bound
