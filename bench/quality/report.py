"""From answers to rows, and from rows to the table: counts, intervals, Markdown and CSV."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import sqrt
from typing import Any

from bench.quality.cells import BASELINES, OFF, Cell
from bench.quality.store import HF, SERVED, Answers
from bench.tasks.held_out import Item, is_right

_Z = 1.959964  # 95 % of a normal distribution lie within


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share; it holds at 0 and n too, unlike +- sigma."""
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"right must be in [0, n] and n positive, got {right} of {n}")
    share, z2 = right / n, _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # the bounds are exact at the ends, floating point is not
    return (0.0 if right == 0 else middle - half), (1.0 if right == n else middle + half)


@dataclass(frozen=True)
class Row:
    """One cell, counted.

    Attributes:
        task: Name of the task, or of the tasks pooled.
        axis: Whose tokens are counted.
        method: Name of the method.
        keep_ratio: Share kept after the last cut.
        n: Questions asked.
        right: Questions answered exactly.
        seen: Tokens of that axis in a prompt, mean.
        kept: Those kept, mean over layers and prompts.
        hf_n: Questions that the transformers loop answered too.
        hf_same: Of those, answers equal to the served ones.
        hf_right: Of those, answers that the loop got right.
    """

    task: str
    axis: str
    method: str
    keep_ratio: float
    n: int
    right: int
    seen: float
    kept: float
    hf_n: int
    hf_same: int
    hf_right: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return wilson(self.right, self.n)


def make_row(cell: Cell, items: Sequence[Item], answers: Answers) -> Row:
    """Count one cell.

    Raises:
        ValueError: An answer is missing.
    """
    right, seen, kept, checks = 0, 0.0, 0.0, []
    for item in items:
        served = answers.get(cell, item.index, SERVED, item.digest)
        if served is None:
            raise ValueError(f"question {item.index} of {cell} has no answer")
        right += is_right(served["text"], item.answer)
        seen += served["seen"]
        kept += served["kept"]
        check = answers.get(cell, item.index, HF, item.digest)
        if check is not None:
            checks.append((check["same"], is_right(check["text"], item.answer)))
    n = len(items)
    hf = (len(checks), sum(same for same, _ in checks), sum(good for _, good in checks))
    key = (cell.task, cell.axis, cell.method, cell.keep_ratio)
    return Row(*key, n, right, seen / n, kept / n, *hf)


def make_rows(asked: Mapping[Cell, Sequence[Item]], answers: Answers) -> list[Row]:
    """Count all cells with the questions asked in each; see `make_row`."""
    rows = [make_row(cell, items, answers) for cell, items in asked.items()]
    # an unpruned prompt keeps what the same prompt shows when it is pruned
    seen = {(row.task, row.axis): row.seen for row in rows if row.method != OFF}
    return [
        replace(row, seen=tokens, kept=tokens)
        if row.method == OFF and (tokens := seen.get((row.task, row.axis)))
        else row
        for row in rows
    ]


def pooled(rows: Sequence[Row], axis: str) -> list[Row]:
    """Return per method and ratio one row over all tasks of an axis; none for a single task."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row.axis == axis:
            groups.setdefault((row.method, row.keep_ratio), []).append(row)
    if all(len(group) < 2 for group in groups.values()):
        return []
    return [_pool(_pool_name(axis), group) for group in groups.values()]


def _pool(name: str, group: Sequence[Row]) -> Row:
    def total(field: str) -> int:
        return sum(getattr(row, field) for row in group)

    n, first = total("n"), group[0]
    return Row(
        *(name, first.axis, first.method, first.keep_ratio, n, total("right")),
        sum(row.seen * row.n for row in group) / n,
        sum(row.kept * row.n for row in group) / n,
        *(total("hf_n"), total("hf_same"), total("hf_right")),
    )


def is_pool(row: Row) -> bool:
    """Return whether a row is one of `pooled`."""
    return row.task == _pool_name(row.axis)


def _pool_name(axis: str) -> str:
    return f"all {axis}"


def with_pools(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with those over all tasks of an axis in front."""
    axes = dict.fromkeys(row.axis for row in rows)
    return [*(row for axis in axes for row in pooled(rows, axis)), *rows]


def wins(rows: Iterable[Row], method: str, over: str = "random") -> list[Row]:
    """Return the rows of `method` whose interval lies above that of `over` at the same ratio."""
    rows = list(rows)
    floor = {(r.task, r.axis, r.keep_ratio): r.interval[1] for r in rows if r.method == over}
    return [
        row
        for row in rows
        if row.method == method
        and row.interval[0] > floor.get((row.task, row.axis, row.keep_ratio), 1.0)
    ]


def verdict(rows: Sequence[Row]) -> str:
    """Say in a line per method where its interval lies wholly above or below that of `random`."""
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        # an axis without the baseline has nothing to compare with
        axes = {row.axis for row in rows if row.method == method}
        compared = any(row.method == BASELINES[0] and row.axis in axes for row in rows)
        if method not in (OFF, *BASELINES) and compared:
            above, below = wins(rows, method), wins(rows, BASELINES[0], over=method)
            lines.append(
                f"{method} against {BASELINES[0]}, disjoint intervals at the same keep_ratio: "
                f"above in {_places(above)}; below in {_places(below)}."
            )
    return "\n".join(lines)


def _places(rows: Sequence[Row]) -> str:
    ratios: dict[str, list[str]] = {}
    for row in rows:
        ratios.setdefault(row.task, []).append(f"{row.keep_ratio:g}")
    named = (f"{task} ({', '.join(values)})" for task, values in ratios.items())
    return ", ".join(named) or "no task"


HEADINGS = ("task", "method", "keep", "tokens", "right %", "95 %", "HF")


def markdown(rows: Sequence[Row]) -> str:
    """Return the table, padded so that it reads as plain text too."""
    lines = [HEADINGS, *(_fields(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]

    def join(line: Sequence[str]) -> str:
        left = [line[i].ljust(widths[i]) for i in range(2)]
        return f"| {' | '.join(left + [line[i].rjust(widths[i]) for i in range(2, 7)])} |"

    rule = [f"{'-' * (w - 1)}{'-' if i < 2 else ':'}" for i, w in enumerate(widths)]
    table = [join(HEADINGS), join(rule)]
    for before, row, line in zip((None, *rows), rows, lines[1:], strict=False):
        # a task's name once: the eye finds groups
        name = "" if before is not None and before.task == row.task else line[0]
        table.append(join((name, *line[1:])))
    return "\n".join(table) + "\n"


def _fields(row: Row) -> tuple[str, ...]:
    low, high = row.interval
    return (
        row.task,
        row.method,
        "" if row.method == OFF else f"{row.keep_ratio:g}",
        f"{row.kept:.0f}/{row.seen:.0f}",
        f"{100 * row.accuracy:.1f}",
        f"{100 * low:.1f}-{100 * high:.1f}",
        f"{row.hf_same}/{row.hf_n}" if row.hf_n else "",
    )


def csv_text(rows: Sequence[Row]) -> str:
    """Return all rows with all their figures."""
    file = io.StringIO()
    bounds = ("accuracy", "low", "high")
    writer = csv.DictWriter(file, [*asdict(rows[0]), *bounds], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        figures = dict(zip(bounds, (row.accuracy, *row.interval), strict=True))
        counts = {**asdict(row), "seen": round(row.seen, 2), "kept": round(row.kept, 2)}
        writer.writerow({**counts, **{k: f"{v:.4f}" for k, v in figures.items()}})
    return file.getvalue()


def read_csv(text: str) -> list[Row]:
    """Return the rows that `csv_text` wrote; intervals are worked out again from the counts.

    Raises:
        ValueError: The text is something else.
    """
    kinds: dict[str, Callable[[str], Any]] = {"task": str, "axis": str, "method": str}
    kinds |= {"keep_ratio": float, "seen": float, "kept": float}
    try:
        return [
            Row(**{f.name: kinds.get(f.name, int)(line[f.name]) for f in fields(Row)})
            for line in csv.DictReader(io.StringIO(text))
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a table of this harness: {error!r}") from None
