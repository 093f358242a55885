"""The held-out questions by task: what is asked, the answer, and when another one is right."""

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.tasks import data, documents, questions
from tokenprune.errors import TokenPruneError


@dataclass(frozen=True)
class Task:
    """One family of questions.

    Attributes:
        name: As in the training data.
        max_tokens: Room for the longest answer; the trained model ends earlier by itself.
    """

    name: str
    max_tokens: int


TASKS = {
    **{name: Task(name, 16) for name in questions.PICTURE_FAMILIES},
    **{name: Task(name, 96) for name in documents.TEXT_FAMILIES},
}


@dataclass(frozen=True)
class Levels:
    """Difficulty, as indices into the training data's levels."""

    picture: int = len(data.PICTURE_LEVELS) - 1
    text: int = len(data.TEXT_LEVELS) - 1


@dataclass(frozen=True)
class Item:
    """One question with its answer, and what it is about: pictures or the text before it."""

    task: str
    index: int
    pictures: tuple[NDArray[np.uint8], ...]
    text: str
    answer: str

    @property
    def digest(self) -> str:
        """Name of what is asked; other generators, seeds or levels ask other things."""
        state = hashlib.sha256(f"{self.text}\n{self.answer}".encode())
        for pixels in self.pictures:
            state.update(pixels.tobytes())
        return state.hexdigest()[:12]


def tasks_at(levels: Levels) -> tuple[str, ...]:
    """Return the tasks that are asked at these levels; easy pictures do not show everything."""
    shown = data.PICTURE_LEVELS[levels.picture].families
    return tuple(name for name in TASKS if name in (*shown, *documents.TEXT_FAMILIES))


@cache
def item(task: str, index: int, seed: int, levels: Levels) -> Item:
    """Return question `index` of a task; it depends on nothing but the arguments.

    Raises:
        TokenPruneError: The level does not show what the task asks for.
    """
    if task not in tasks_at(levels):
        raise TokenPruneError(
            f"{task} must be among the tasks of picture level {levels.picture}: "
            + ", ".join(tasks_at(levels))
        )
    # a stream of its own per question: a larger n asks the same questions first
    step = index * len(TASKS) + list(TASKS).index(task)
    if task in questions.PICTURE_FAMILIES:
        rng = data.generator(seed, "test", "picture", step)
        return _picture_item(rng, task, index, data.PICTURE_LEVELS[levels.picture])
    rng = data.generator(seed, "test", "text", step)
    return _text_item(rng, task, index, data.TEXT_LEVELS[levels.text])


def _picture_item(rng: np.random.Generator, task: str, index: int, level: Any) -> Item:
    number = level.most_pictures if rng.random() < 0.5 else 1
    while True:
        shown = [data.draw_picture(rng, "test", level) for _ in range(number)]
        about = int(rng.integers(number))
        # a picture without what this family asks for is drawn again
        if asked := questions.ask(rng, shown[about], (task,), 1):
            break
    _, (text, answer) = asked[0]
    lead = f"in picture {about + 1} " if number > 1 else ""
    return Item(task, index, tuple(p.pixels for p in shown), lead + text, answer)


def _text_item(rng: np.random.Generator, task: str, index: int, level: Any) -> Item:
    document = documents.write(
        rng,
        # facts of the other families stay in as distractors
        tokens=int(rng.integers(level.tokens // 2, level.tokens + 1)),
        most_digits=level.most_digits,
        most_keys=level.most_keys,
        most_items=level.most_items,
        most_words=level.most_words,
    )
    text, answer = next(asked for family, asked in document.questions if family == task)
    return Item(task, index, (), f"{document.text} {text}", answer)


def is_right(text: str, answer: str) -> bool:
    """Return whether an answer matches exactly; white space does not count."""
    return text.split() == answer.split()
