"""Run `python -m bench.lm_eval`."""

import sys

from bench.lm_eval.make_data import main

if __name__ == "__main__":
    sys.exit(main())
