"""Networks in Flax NNX: callable pytrees (t, x, cond) -> an array of the shape of x."""

from .adm import Adm as Adm
from .adm import ADMUNet as ADMUNet
from .configs import Mlp as Mlp
from .configs import Unet as Unet
from .configs import init as init
from .dit import DiffusionTransformer as DiffusionTransformer
from .dit import Dit as Dit
from .edm2 import Edm2 as Edm2
from .edm2 import EDM2UNet as EDM2UNet
from .heavy_tails import Tails as Tails
from .image_condition import Beside as Beside
from .magnitude_preserving import normalise_weights as normalise_weights
from .mlp import MLP as MLP
from .ncsnpp import Ddpmpp as Ddpmpp
from .ncsnpp import Ncsnpp as Ncsnpp
from .ncsnpp import ScoreUNet as ScoreUNet
from .unet import UNet as UNet
