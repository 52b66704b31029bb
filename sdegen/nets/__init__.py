"""Networks in Flax NNX: callable pytrees (t, x, cond) -> an array of the shape of x."""

from .mlp import MLP as MLP
from .recipes import Mlp as Mlp
from .recipes import Unet as Unet
from .recipes import init as init
from .tails import Tails as Tails
from .unet import UNet as UNet
