"""Networks in Flax NNX: callable pytrees (t, x, cond) -> an array of the shape of x."""

from .._compat import renamed as _renamed
from .adapter import wrap as wrap
from .adm import ADMConfig as ADMConfig
from .adm import ADMUNet as ADMUNet
from .dit import DiffusionTransformer as DiffusionTransformer
from .dit import DiTConfig as DiTConfig
from .edm2 import EDM2Config as EDM2Config
from .edm2 import EDM2UNet as EDM2UNet
from .heavy_tails import HeavyTailed as HeavyTailed
from .image_condition import ImageConditioned as ImageConditioned
from .magnitude_preserving import normalise_weights as normalise_weights
from .mlp import MLP as MLP
from .mlp import MLPConfig as MLPConfig
from .ncsnpp import DDPMppConfig as DDPMppConfig
from .ncsnpp import NCSNppConfig as NCSNppConfig
from .ncsnpp import ScoreUNet as ScoreUNet
from .network import init as init
from .unet import UNet as UNet
from .unet import UNetConfig as UNetConfig

__getattr__ = _renamed(__name__)
