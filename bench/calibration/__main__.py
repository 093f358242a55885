"""Run `python -m bench.calibration`."""

import sys

from bench.calibration.run import main

if __name__ == "__main__":
    sys.exit(main())
