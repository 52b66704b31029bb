"""`python -m sdegen.sweeps`, the same as `sdegen sweep`."""

from .command import main

if __name__ == "__main__":
    main()
