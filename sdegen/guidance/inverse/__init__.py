"""Inverse problems y = A(x0) + noise, one file per family of methods."""

from .guided import DDNM as DDNM
from .guided import DPS as DPS
from .guided import TMPD as TMPD
from .guided import AbstractGuided as AbstractGuided
from .guided import MeasurementGuided as MeasurementGuided
from .guided import PiGDM as PiGDM
from .measurement import Measurement as Measurement
from .method import AbstractMethod as AbstractMethod
from .particles import TwistedParticles as TwistedParticles
from .repaint import RePaint as RePaint
