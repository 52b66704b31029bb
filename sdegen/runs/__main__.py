"""`python -m sdegen.runs`, the same as `sdegen report`."""

from .report import main

if __name__ == "__main__":
    main(prog="python -m sdegen.runs")
