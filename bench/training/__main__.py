"""Run `python -m bench.training`."""

import sys

from bench.training.train import main

if __name__ == "__main__":
    sys.exit(main())
