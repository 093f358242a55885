"""What `docs/capacity.md` shows of a `tokenprune demo --json` record."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from tokenprune.demo.quiz import QuizRow
from tokenprune.demo.quiz_report import quiz_table
from tokenprune.demo.report import WIDTH, Row, SpeedRow, results_table

R = TypeVar("R", bound=Row)


def tables(record: Mapping[str, Any]) -> str:
    """Return both tables and where they were measured."""
    answers, speed = record["answers"], record["speed"]
    shown = (quiz_table(_rows(QuizRow, answers)), results_table(_rows(SpeedRow, speed)))
    first, second = map(_text, shown)
    return (
        f"```\n{first}\n\n{second}\n```\n\n"
        f"{len(answers['questions'])} questions, {answers['concurrency']} at a time, on "
        f"{record['machine']['cores']} cores of an {record['machine']['cpu']}, keep_ratio "
        f"{record['keep_ratio']:g}."
    )


def _rows(kind: type[R], part: Mapping[str, Any]) -> Sequence[R]:
    names = [field.name for field in fields(kind)]
    return [kind(**{name: row[name] for name in names}) for row in part["rows"]]


def _text(table: Table) -> str:
    file = io.StringIO()
    Console(file=file, width=WIDTH).print(table)
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    return "\n".join(line for line in lines if line)
