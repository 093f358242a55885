"""The table of the README: methods at equal work, from the committed quality results."""

from collections.abc import Mapping, Sequence

from bench.common import table
from bench.quality.cells import OFF
from bench.quality.report import Row, is_pool

# the cells whose work the others of their axis are compared at
LEVELS = {"visual": ("transprune", 0.25), "kv": ("lagkv", 0.5)}
# cells further away than this share of the tokens are of another level
_NEAR = 0.02
# rows that prune other axes too do less work than their own axis shows
_COMPOSED = ("all-axes",)


def equal_work(rows: Mapping[str, Sequence[Row]]) -> str:
    """Return a table of the cells that hold about as many tokens, per axis.

    Args:
        rows: Those of each axis of `LEVELS`.
    """
    lines = [["method", "keep_ratio", "held", "right answers", "95 %"]]
    for axis, level in LEVELS.items():
        pools = [row for row in rows[axis] if is_pool(row) and row.method not in _COMPOSED]
        (reference,) = [row for row in pools if (row.method, row.keep_ratio) == level]
        nearest: dict[str, Row] = {}
        for row in sorted(pools, key=lambda row: abs(held(row) - held(reference))):
            nearest.setdefault(row.method, row)
        shown = [
            row
            for row in nearest.values()
            if row.method == OFF or abs(held(row) - held(reference)) <= _NEAR
        ]
        shown.sort(key=lambda row: -row.right / row.n)
        lines += [row_cells(f"{axis}: {row.method}", row) for row in shown]
    return table(lines)


def held(row: Row) -> float:
    """Return the share of the tokens of an axis that is held, mean over layers and prompts."""
    return row.kept / row.seen


def row_cells(title: str, row: Row) -> list[str]:
    """Return the cells of a row: title, keep ratio, what is held, right answers, 95 % interval."""
    low, high = (f"{100 * bound:.1f}" for bound in row.interval)
    return [
        title,
        "" if row.method == OFF else f"{row.keep_ratio:g}",
        f"{100 * held(row):.0f} %",
        f"{100 * row.accuracy:.1f} %",
        f"{low}-{high}",
    ]
