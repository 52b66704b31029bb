"""Sampling: from noise to data, and any process as it is written."""

from .sample import sample as sample
from .simulate import simulate as simulate
