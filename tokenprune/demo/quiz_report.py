"""What the demo says about its questions: the table, one of them in full, the verdict."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich import box
from rich.table import Table

from tokenprune.demo.quiz import Question, QuizRow
from tokenprune.demo.report import all_kept, blocks_not_saved, kept_text

LEAST_ACCURACY = 0.85
"""Of the unpruned model; below it the comparison says little."""


def quiz_table(rows: Sequence[QuizRow]) -> Table:
    """Return the table of methods, at most 80 columns wide."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("\nmethod", no_wrap=True)
    table.add_column("answers\nright?", justify="right")
    table.add_column("visual tokens\nkept per stage")
    table.add_column("KV blocks\nheld", justify="right")
    table.add_column("TTFT\nms", justify="right")
    for row in rows:
        table.add_row(
            row.method,
            score(row),
            kept_text(row.kept or all_kept(rows)),
            str(row.kv_blocks),
            f"{row.ttft_median * 1000:.0f}",
        )
    return table


def score(row: QuizRow) -> str:
    """Return right answers of all, as `46/48`."""
    return f"{row.num_right}/{len(row.answers)}"


def example(questions: Sequence[Question], rows: Sequence[QuizRow]) -> list[str]:
    """Return one question with every answer, as lines.

    It is the first one that the unpruned model answers right and a pruned one wrong; where there
    is none, the first.
    """
    chosen = 0
    for index, question in enumerate(questions):
        verdicts = [question.is_right(row.answers[index]) for row in rows]
        if verdicts[0] and not all(verdicts):
            chosen = index
            break
    question = questions[chosen]
    lines = [
        f"{' and '.join(question.names)}: {question.text}",
        f"  {'right answer':12}  {question.answer}",
    ]
    for row in rows:
        mark = "right" if question.is_right(row.answers[chosen]) else "wrong"
        # a wrong answer may have any length
        answer = textwrap.shorten(row.answers[chosen], 40, placeholder=" ...")
        lines.append(f"  {row.method:12}  {answer} ({mark})")
    return lines


def quiz_verdict(rows: Sequence[QuizRow]) -> tuple[str, bool]:
    """Return a sentence computed from the figures, and whether they are as they should be.

    Args:
        rows: The table's rows; the first is unpruned, and the last is spoken of.
    """
    full, last = rows[0], rows[-1]
    if full.num_right < LEAST_ACCURACY * len(full.answers):
        return (
            f"the unpruned model must answer {LEAST_ACCURACY:.0%} of the questions right, "
            f"got {score(full)}"
        ), False
    if complaint := blocks_not_saved(rows):
        return complaint, False
    return (
        f"{last.method}: {score(last)} right against {score(full)} unpruned, with "
        f"{full.kv_blocks / last.kv_blocks:.1f}x fewer KV blocks"
    ), True
