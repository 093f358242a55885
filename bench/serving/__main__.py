"""Run `python -m bench.serving`."""

import sys

from bench.serving.run import main

if __name__ == "__main__":
    sys.exit(main())
