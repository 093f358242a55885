"""Put what was measured, and what the code knows, into the pages.

    python -m bench.publish [--root FOLDER]

Every figure of the pages stands between two marks and is made here, from the committed results in
`bench/results`, as are tables that follow from the code; `tests/bench/publish/test_pages.py` holds
the pages to it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.capacity import report as capacity
from bench.common import write_whole
from bench.publish import demo_tables
from bench.publish.equal_work import equal_work
from bench.publish.methods import figures, parameters
from bench.publish.models import models
from bench.publish.quality_tables import committed
from bench.publish.support import support
from bench.quality.cells import AXES
from tokenprune.demo.builtin import FOLDER
from tokenprune.errors import TokenPruneError
from tokenprune.policies import AXES as POLICY_AXES
from tokenprune.policies import methods

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


def blocks() -> dict[str, dict[str, str]]:
    """Return the text of each block by its name, by page.

    Raises:
        TokenPruneError: Results are missing or damaged, or not of the built-in model.
    """
    found = {axis: committed(axis, FOLDER, RESULTS / "quality") for axis in AXES}
    rows = {axis: rows for axis, (rows, _) in found.items()}
    quality = {f"quality-{axis}": text for axis, (_, text) in found.items()}
    pages = {
        "README.md": {"equal-work": equal_work(rows)},
        "docs/quality.md": quality,
        "docs/capacity.md": {
            "demo": demo_tables.tables(json.loads((RESULTS / "demo-cpu.json").read_text())),
            "capacity": capacity.markdown(json.loads((RESULTS / "capacity-cpu.json").read_text())),
        },
        "docs/models.md": {"models": models()},
        "docs/support.md": {"support": support(ROOT / "tests")},
    }
    for axis in POLICY_AXES:
        for name, policy in methods(axis).items():
            page = {"parameters": parameters(policy), "figures": figures(name, rows[axis])}
            pages[f"docs/methods/{axis}-{name}.md"] = page
    return pages


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
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the pages")
    options = parser.parse_args(arguments)
    written: dict[Path, str] = {}
    try:
        for name, texts in blocks().items():
            page = (options.root / name).read_text()
            for block, text in texts.items():
                try:
                    page = with_block(page, block, text)
                except TokenPruneError as error:
                    raise TokenPruneError(f"{name}: {error}") from None
            written[options.root / name] = page
        for path, page in written.items():
            write_whole(path, page)
    except (TokenPruneError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"{len(written)} pages show the results in {RESULTS}")
    return 0
