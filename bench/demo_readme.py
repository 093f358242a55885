"""Put the tables of the committed demo run into the README.

    tokenprune demo --json bench/results/demo-cpu.json
    python -m bench.demo_readme

The README's figures come from that file only; `tests/test_docs.py` compares them.
"""

import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from tokenprune.demo.quiz import QuizRow
from tokenprune.demo.quiz_report import quiz_table
from tokenprune.demo.report import WIDTH, Row, SpeedRow, results_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "demo-cpu.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- demo:begin -->\n", "<!-- demo:end -->\n"

R = TypeVar("R", bound=Row)


def tables(record: Mapping[str, Any]) -> str:
    """Return the README's part with both tables of a `tokenprune demo --json` record."""
    answers, speed = record["answers"], record["speed"]
    shown = (quiz_table(_rows(QuizRow, answers)), results_table(_rows(SpeedRow, speed)))
    first, second = map(_text, shown)
    return (
        f"{BEGIN}```\n{first}\n\n{second}\n```\n\n"
        f"{len(answers['questions'])} questions, {answers['concurrency']} at a time, on "
        f"{record['machine']['cores']} cores of an {record['machine']['cpu']}, keep_ratio "
        f"{record['keep_ratio']:g}.\n{END}"
    )


def _rows(kind: type[R], part: Mapping[str, Any]) -> Sequence[R]:
    names = [field.name for field in fields(kind)]
    return [kind(**{name: row[name] for name in names}) for row in part["rows"]]


def _text(table: Table) -> str:
    file = io.StringIO()
    Console(file=file, width=WIDTH).print(table)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    return "\n".join(line for line in lines if line)


def main() -> int:
    page = README.read_text()
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        print(f"README.md must hold {BEGIN.strip()} and {END.strip()}", file=sys.stderr)
        return 1
    README.write_text(head + tables(json.loads(RESULTS.read_text())) + tail)
    return 0


if __name__ == "__main__":
    sys.exit(main())
