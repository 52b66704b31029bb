"""Data sets, and the order in which training sees them."""

from .augment import compose as compose
from .augment import flip as flip
from .augment import shift as shift
from .batches import batch_indices as batch_indices
from .digits import digits as digits
from .files import Files as Files
from .folder import ImageFolder as ImageFolder
from .folder import array_records as array_records
from .image_sets import cifar10 as cifar10
from .image_sets import fashion_mnist as fashion_mnist
from .image_sets import mnist as mnist
from .labels import one_hot as one_hot
from .mixture import Mixture as Mixture
from .mixture import ring as ring
from .prefetch import prefetch as prefetch
from .stream import AbstractStream as AbstractStream
from .stream import Arrays as Arrays
from .two_dim import Planar as Planar
from .two_dim import checkerboard as checkerboard
from .two_dim import eight_gaussians as eight_gaussians
from .two_dim import gaussian as gaussian
from .two_dim import moons as moons
from .two_dim import s_curve as s_curve
