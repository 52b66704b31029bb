"""Is a process what it says it is? `sdegen.check`, and `sdegen check` in the shell."""

from .report import Report as Report
from .report import Row as Row
from .run import PARTS as PARTS
from .run import check as check
