"""Data sets, and the order in which training sees them."""

from .augment import compose as compose
from .augment import flip as flip
from .augment import shift as shift
from .batches import batch_indices as batch_indices
from .digits import digits as digits
from .files import Files as Files
from .folder import ImageFolder as ImageFolder
from .folder import array_records as array_records
from .labels import one_hot as one_hot
from .planar import Planar as Planar
from .planar import checkerboard as checkerboard
from .planar import eight_gaussians as eight_gaussians
from .planar import gaussian as gaussian
from .planar import moons as moons
from .planar import s_curve as s_curve
from .prefetch import prefetch as prefetch
from .sets import cifar10 as cifar10
from .sets import fashion_mnist as fashion_mnist
from .sets import mnist as mnist
from .stream import AbstractStream as AbstractStream
from .stream import Arrays as Arrays
from .toy import Mixture as Mixture
from .toy import ring as ring
