"""Guidance: a denoiser made from denoisers, one file per family."""

from .base import AbstractGuidance as AbstractGuidance
from .base import Interval as Interval
from .base import Unconditional as Unconditional
from .compose import MixtureOf as MixtureOf
from .compose import ProductOf as ProductOf
from .contrast import Autoguided as Autoguided
from .contrast import ClassifierFree as ClassifierFree
from .dropout import LabelDropout as LabelDropout
from .gradient import ClassifierGuided as ClassifierGuided
from .gradient import RewardGuided as RewardGuided
