"""The built-in processes, one file per family; each writes alpha and sigma only.

`LinearSDE` and `CustomSDE` take coefficients instead, from the user.
"""

from .custom import CustomSDE as CustomSDE
from .flow import FlowMatching as FlowMatching
from .flow import RectifiedFlow as RectifiedFlow
from .linear import LinearSDE as LinearSDE
from .ve import EDM as EDM
from .ve import VE as VE
from .vp import DDPM as DDPM
from .vp import VP as VP
from .vp import Cosine as Cosine
from .vp import SubVP as SubVP
