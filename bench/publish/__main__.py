"""Run `python -m bench.publish`."""

import sys

from bench.publish.pages import main

if __name__ == "__main__":
    sys.exit(main())
