"""Guidance: a denoiser made from denoisers, one file per family."""

from .classifier import ClassifierGuided as ClassifierGuided
from .classifier import RewardGuided as RewardGuided
from .classifier_free import Autoguided as Autoguided
from .classifier_free import ClassifierFree as ClassifierFree
from .composed import MixtureOf as MixtureOf
from .composed import ProductOf as ProductOf
from .guidance import AbstractGuidance as AbstractGuidance
from .guidance import Interval as Interval
from .guidance import Unconditional as Unconditional
from .label_dropout import LabelDropout as LabelDropout
