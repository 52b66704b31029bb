"""Solving on a rising clock through Diffrax: the entry, the controller, the counts."""

from .solve import GridController as GridController
from .solve import Solution as Solution
from .solve import evaluations as evaluations
from .solve import solve as solve
