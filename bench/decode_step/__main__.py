"""Run `python -m bench.decode_step`."""

import sys

from bench.decode_step.run import main

if __name__ == "__main__":
    sys.exit(main())
