"""Put what was measured into the README.

    python -m bench.publish [--readme FILE]

Every figure of the README stands between two marks and is made here, from the committed results in
`bench/results`; `tests/bench/publish/test_readme.py` holds the README to it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.capacity import run as capacity
from bench.publish import demo_tables
from bench.publish.quality_readme import committed_block
from bench.quality.cells import AXES
from bench.quality.store import write_whole
from tokenprune.demo.builtin import FOLDER
from tokenprune.errors import TokenPruneError

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"


def blocks() -> dict[str, str]:
    """Return the text of each block by its name.

    Raises:
        TokenPruneError: Results are missing or damaged, or not of the built-in model.
    """
    return {
        "demo": demo_tables.tables(json.loads((RESULTS / "demo-cpu.json").read_text())),
        **{f"quality-{axis}": committed_block(axis, FOLDER, RESULTS / "quality") for axis in AXES},
        "capacity": capacity.markdown(json.loads((RESULTS / "capacity-cpu.json").read_text())),
    }


def with_block(page: str, name: str, text: str) -> str:
    """Return the page with `text` between the marks of a block.

    Raises:
        TokenPruneError: The page must have each mark once, in order.
    """
    first, last = (f"<!-- {name}:{mark} -->" for mark in ("begin", "end"))
    head, begin, rest = page.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end or first in rest or last in tail:
        raise TokenPruneError(f"the page must hold {first} and {last} once each, in this order")
    return f"{head}{first}\n{text.rstrip()}\n{last}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write all blocks, or none."""
    parser = argparse.ArgumentParser("bench.publish", description=__doc__.split("\n")[0])
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(arguments)
    try:
        page = options.readme.read_text()
        for name, text in blocks().items():
            page = with_block(page, name, text)
        write_whole(options.readme, page)
    except (TokenPruneError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"{options.readme} shows the results in {RESULTS}")
    return 0
