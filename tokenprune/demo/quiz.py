"""The demo's questions: a small fixed set that the package ships, asked with and without pruning.

* Right: the answer's words are exactly the expected ones, greedy decoding. `random` draws anew for
  each question.
* TTFT: from sending a request to its first streamed chunk, while `CONCURRENCY` questions are in
  work; one method after the other.
* KV blocks held: vLLM's own gauge on the metrics page, read with each token of one more request of
  each method, which runs alone and is not timed; the median of those that saw it.

`bench/tasks/demo_questions.py` made the set from held-out data.
"""

from __future__ import annotations

import asyncio
import base64
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from tokenprune.demo import builtin, measure
from tokenprune.demo.local_server import LocalServer
from tokenprune.demo.measure import PruningField, PruningFields, closing_usage, pruning_fields
from tokenprune.demo.report import Row, kv_pool
from tokenprune.errors import InstallationError

FOLDER = Path(__file__).parent / "pictures"
INDEX = "questions.json"
# vflowopt is left to the second part: its published parameters are those of another vision tower
METHODS = tuple(method for method in measure.METHODS if method != "vflowopt")
CONCURRENCY = 4

_MOST_ANSWER_TOKENS = 16
_MOST_READINGS = 5
# the first requests wait for warm-up
_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class Question:
    """One question about one or two pictures.

    Attributes:
        pictures: PNG files of 96 x 96 pixels.
        family: Kind of question, e.g. `count`.
        text: The question.
        answer: The right answer.
    """

    pictures: tuple[Path, ...]
    family: str
    text: str
    answer: str

    @property
    def names(self) -> list[str]:
        """File names of the pictures."""
        return [picture.name for picture in self.pictures]

    @property
    def content(self) -> list[dict[str, Any]]:
        """Parts of the user's message: the pictures as data URLs, then the question."""
        coded = [base64.b64encode(picture.read_bytes()).decode() for picture in self.pictures]
        urls = [f"data:image/png;base64,{code}" for code in coded]
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return [*parts, {"type": "text", "text": self.text}]

    def is_right(self, answer: str) -> bool:
        """Return whether an answer is exactly the right one; white space does not count."""
        return answer.split() == self.answer.split()


@dataclass
class QuizRow(Row):
    """One method's answers.

    Attributes:
        answers: Text of each answer, in the order of the questions.
        num_right: How many of them are right.
    """

    answers: list[str] = field(default_factory=list)
    num_right: int = 0


def load_questions(folder: Path = FOLDER) -> list[Question]:
    """Return the questions of the package.

    Raises:
        InstallationError: A file is missing or damaged.
    """
    index = folder / INDEX
    try:
        questions = [
            Question(
                tuple(folder / name for name in entry["pictures"]),
                *(str(entry[key]) for key in ("family", "question", "answer")),
            )
            for entry in builtin.read_json(index)["questions"]
        ]
    except (KeyError, TypeError) as error:
        raise InstallationError(
            f"{index} must list questions, got {error!r}; {builtin.AGAIN}"
        ) from None
    for picture in {picture for question in questions for picture in question.pictures}:
        if not picture.is_file():
            raise InstallationError(
                f"{picture} must come with tokenprune, got no such file; {builtin.AGAIN}"
            )
    return questions


def num_requests(questions: Sequence[Question]) -> int:
    """Return how many requests `ask_questions` sends."""
    return (len(METHODS) + 1) * (len(questions) + 1)


def ask_questions(
    server: LocalServer,
    questions: Sequence[Question],
    keep_ratio: float,
    advance: Callable[[], object],
) -> list[QuizRow]:
    """Return one row per method, calling `advance` after each of the `num_requests` requests.

    Args:
        server: Serves the built-in model.
        questions: What to ask.
        keep_ratio: Share of the visual tokens that survives the last cut.
        advance: Called after each request.

    Raises:
        TokenPruneError: An answer says that the method was not applied.
    """
    return asyncio.run(_ask_questions(server, questions, keep_ratio, advance))


async def _ask_questions(
    server: LocalServer,
    questions: Sequence[Question],
    keep_ratio: float,
    advance: Callable[[], object],
) -> list[QuizRow]:
    # by question and method: one random draw for all questions would measure that draw
    fields = [pruning_fields(keep_ratio, seed, METHODS) for seed in range(len(questions))]
    rows = [QuizRow(method, answers=[""] * len(questions)) for method in fields[0]]
    longest = max(questions, key=lambda question: len(question.pictures))
    async with server.async_client(_TIMEOUT_SECONDS) as client:
        for row in rows:
            # also the warm-up
            pruning = fields[0][row.method]
            row.kv_blocks, row.usage = await _blocks_held(
                client, server, row.method, longest, pruning
            )
            advance()
        for row in rows:
            work = iter(enumerate(questions))
            await asyncio.gather(
                *(_answer(client, row, work, fields, advance) for _ in range(CONCURRENCY))
            )
            pairs = zip(questions, row.answers, strict=True)
            row.num_right = sum(question.is_right(answer) for question, answer in pairs)
    return rows


async def _answer(
    client: AsyncOpenAI,
    row: QuizRow,
    work: Iterator[tuple[int, Question]],
    fields: Sequence[PruningFields],
    advance: Callable[[], object],
) -> None:
    """Answer questions until none is left; all workers of a row share one iterator."""
    for index, question in work:
        first = 0.0
        started = time.perf_counter()
        async for chunk in await _stream(client, question, fields[index][row.method]):
            if chunk.usage is not None:
                closing_usage(row.method, chunk)
            if chunk.choices:
                first = first or time.perf_counter()
                row.answers[index] += chunk.choices[0].delta.content or ""
        row.ttft_seconds.append(first - started)
        advance()


async def _blocks_held(
    client: AsyncOpenAI,
    server: LocalServer,
    method: str,
    question: Question,
    pruning: PruningField,
) -> tuple[int, dict[str, Any]]:
    """Return the blocks of the pool in use while one request runs alone, and its usage."""
    readings: list[int] = []
    usage: dict[str, Any] = {}
    for _ in range(_MOST_READINGS):
        # most answers end with their first tokens, before the page can be read
        async for chunk in await _stream(client, question, pruning, ignore_eos=True):
            if chunk.usage is not None:
                usage = closing_usage(method, chunk)
            else:
                readings.append(kv_pool(server.metrics())[0])
        # on a busy machine all tokens may arrive when the request is already gone
        if any(readings):
            break
    # the page may lag behind the first token, and whether it still shows a block that the last one
    # opened is a matter of luck
    return statistics.median_low([held for held in readings if held] or [0]), usage


async def _stream(
    client: AsyncOpenAI, question: Question, pruning: PruningField, **extra: Any
) -> Any:
    messages: Any = [{"role": "user", "content": question.content}]
    return await client.chat.completions.create(
        model=builtin.NAME,
        messages=messages,
        max_tokens=_MOST_ANSWER_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"pruning": pruning, **extra},
    )
