"""What `docs/quality.md` shows of the committed quality results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from bench.common import table
from bench.quality.cells import OFF
from bench.quality.output import (
    FIGURES,
    TABLE,
    facts,
    picture_name,
    read_results,
)
from bench.quality.report import Row, is_pool, markdown, verdict
from bench.quality.store import model_hash
from tokenprune.errors import TokenPruneError

# as the page links to them
FOLDER = "../bench/results/quality"
_WIDTH = 79


def block(rows: Sequence[Row], summary: Mapping[str, Any], folder: str) -> str:
    """Return the text between the marks.

    Args:
        rows: All rows, with those over all tasks of an axis.
        summary: What else is known of the run.
        folder: Where the results lie, as the page links to them.
    """
    parts = [facts(summary)]
    for axis in dict.fromkeys(row.axis for row in rows):
        here = [row for row in rows if row.axis == axis]
        parts.append(markdown([row for row in here if is_pool(row)]).rstrip())
        parts.append(f"![{axis}: accuracy against tokens kept]({folder}/{picture_name(axis)})")
    ratios = sorted({row.keep_ratio for row in rows if row.method != OFF})
    if ratios:
        # the middle one: whoever wants another finds all of them in the whole table
        ratio = ratios[len(ratios) // 2]
        parts.append(f"By task, right answers in %, at keep_ratio {ratio:g}:")
        parts.append(by_task(rows, ratio))
    parts += verdict(rows).splitlines()
    parts.append(f"[The whole table]({folder}/{TABLE}) and its [figures]({folder}/{FIGURES}).")
    return "\n\n".join(p if p.startswith(("|", "!")) else fill(p, _WIDTH) for p in parts)


def by_task(rows: Sequence[Row], ratio: float) -> str:
    """Return a table with a line per method and a column per task, at one keep ratio."""
    shown = [r for r in rows if not is_pool(r) and (r.method == OFF or r.keep_ratio == ratio)]
    tasks = list(dict.fromkeys(row.task for row in shown))
    cells: dict[str, dict[str, str]] = {}
    for row in shown:
        cells.setdefault(row.method, {})[row.task] = f"{100 * row.accuracy:.1f}"
    lines = [
        ["method", *tasks],
        *([method, *(line.get(task, "") for task in tasks)] for method, line in cells.items()),
    ]
    return table(lines)


def committed(axis: str, model: Path, results: Path) -> tuple[Sequence[Row], str]:
    """Return the results of an axis, and the text that they give.

    Raises:
        TokenPruneError: They are missing or damaged, or not of this model.
    """
    rows, summary = read_results(results / axis)
    if (found := summary["model"]) != (wanted := model_hash(model)):
        raise TokenPruneError(
            f"the results in {results / axis} must be of the model in {model}, {wanted[:12]}, "
            f"got those of {found[:12]}; measure again with: make quality"
        )
    return rows, block(rows, summary, f"{FOLDER}/{axis}")
