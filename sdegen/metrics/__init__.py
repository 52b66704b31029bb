"""Distances between two sets of samples."""

from .distance import mmd2 as mmd2
from .distance import nearest as nearest
from .distance import w2 as w2
