"""Write what the README says about quality, from the committed results.

    python -m bench.quality_readme [--results DIR] [--readme FILE]

Run by `make quality`. The text between the two marks is made here and nowhere else; a test holds
the README to it.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from bench.quality_output import (
    FIGURES,
    TABLE,
    facts,
    picture_name,
    read_results,
)
from bench.quality_report import Row, is_pool, markdown, verdict
from bench.quality_store import model_hash, write_whole
from bench.quality_tasks import OFF
from tokenprune.demo.builtin import FOLDER
from tokenprune.errors import TokenPruneError

RESULTS, README = Path("bench/results/quality"), Path("README.md")
BEGIN, END = "<!-- quality:begin -->", "<!-- quality:end -->"
_WIDTH = 79


def block(rows: Sequence[Row], summary: Mapping[str, Any], folder: str) -> str:
    """Return the text between the marks.

    Args:
        rows: All rows, with those over all tasks of an axis.
        summary: What else is known of the run.
        folder: Where the results lie, as the README links to them.
    """
    parts = [facts(summary)]
    for axis in dict.fromkeys(row.axis for row in rows):
        here = [row for row in rows if row.axis == axis]
        if any(row.method != OFF for row in here):
            parts.append(markdown([row for row in here if is_pool(row)]).rstrip())
            parts.append(f"![{axis}: accuracy against tokens kept]({folder}/{picture_name(axis)})")
    ratios = sorted({row.keep_ratio for row in rows if row.method != OFF})
    if ratios:
        # the middle one: whoever wants another finds all of them in the whole table
        ratio = ratios[len(ratios) // 2]
        parts.append(
            f"By task, right answers in % with their 95 % interval, at keep_ratio {ratio:g}:"
        )
        parts.append(by_task(rows, ratio))
    parts += verdict(rows).splitlines()
    parts.append(f"[The whole table]({folder}/{TABLE}) and its [figures]({folder}/{FIGURES}).")
    return "\n\n".join(p if p.startswith(("|", "!")) else fill(p, _WIDTH) for p in parts)


def by_task(rows: Sequence[Row], ratio: float) -> str:
    """Return a table with a line per task and a column per method, at one keep ratio."""
    shown = [r for r in rows if not is_pool(r) and (r.method == OFF or r.keep_ratio == ratio)]
    methods = list(dict.fromkeys(row.method for row in shown))
    cells: dict[str, dict[str, str]] = {}
    for row in shown:
        low, high = row.interval
        text = f"{100 * row.accuracy:.1f} ({100 * low:.0f}-{100 * high:.0f})"
        cells.setdefault(row.task, {})[row.method] = text
    lines = [
        ["task", *methods],
        *([task, *(line.get(method, "") for method in methods)] for task, line in cells.items()),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(methods) + 1)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def with_block(page: str, text: str) -> str:
    """Return the page with `text` between its marks.

    Raises:
        TokenPruneError: The page must have each mark once, in order.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise TokenPruneError(f"the page must hold {BEGIN} and {END} once each, in this order")
    return f"{head}{BEGIN}\n{text.rstrip()}\n{END}{tail}"


def committed_block(results: Path, model: Path) -> str:
    """Return the text that the results give.

    Raises:
        TokenPruneError: They are missing or damaged, or not of this model.
    """
    rows, summary = read_results(results)
    if (found := summary["model"]) != (wanted := model_hash(model)):
        raise TokenPruneError(
            f"the results in {results} must be of the model in {model}, {wanted[:12]}, got those "
            f"of {found[:12]}; measure again with: make quality"
        )
    return block(rows, summary, RESULTS.as_posix())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.quality_readme", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--model", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    try:
        page = options.readme.read_text()
        write_whole(
            options.readme, with_block(page, committed_block(options.results, options.model))
        )
    except (TokenPruneError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"{options.readme} shows the results in {options.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
