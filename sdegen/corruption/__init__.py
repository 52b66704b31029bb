"""Unified diffusion: chains that corrupt data in any way, and restore them."""

from .._compat import renamed as _renamed
from ..sampling.sample import sample as sample
from .cold import Cold as Cold
from .corruption import AbstractCorruption as AbstractCorruption
from .degradations import Blur as Blur
from .degradations import Downsample as Downsample
from .degradations import Inpaint as Inpaint
from .degradations import dissipate as dissipate
from .edit import Edit as Edit
from .gaussian import Gaussian as Gaussian
from .heat import HeatDissipation as HeatDissipation
from .mask import Mask as Mask
from .restorer import Restorer as Restorer
from .restorer import corrupt as corrupt
from .restorer import restoration_loss as restoration_loss

__getattr__ = _renamed(__name__)
