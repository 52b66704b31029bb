"""Is a process what it says it is? `sdegen.check(process)`, or from the shell.

`sdegen check sdegen:VP` prints the same report.
"""

from .report import Report as Report
from .report import Row as Row
from .run import PARTS as PARTS
from .run import check as check
