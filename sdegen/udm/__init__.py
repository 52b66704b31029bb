"""Unified diffusion: chains that corrupt data in any way, and restore them."""

from .cold import Cold as Cold
from .degrade import Blur as Blur
from .degrade import Downsample as Downsample
from .degrade import Inpaint as Inpaint
from .degrade import dissipate as dissipate
from .edit import Edit as Edit
from .heat import HeatDissipation as HeatDissipation
from .hot import Hot as Hot
from .mask import Mask as Mask
from .restore import Chain as Chain
from .restore import Restorer as Restorer
from .restore import corrupt as corrupt
from .restore import restoration_loss as restoration_loss
from .restore import sample as sample
from .system import AbstractCorruption as AbstractCorruption
