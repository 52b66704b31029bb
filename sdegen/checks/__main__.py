"""`python -m sdegen.checks`, the same as `sdegen check`."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
