"""Run `python -m bench.capacity`."""

import sys

from bench.capacity.run import main

if __name__ == "__main__":
    sys.exit(main())
