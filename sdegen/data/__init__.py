"""Data sets, and the order in which training sees them."""

from .batches import batch_indices as batch_indices
from .digits import digits as digits
from .toy import Mixture as Mixture
from .toy import ring as ring
