"""Held-out accuracy of each task family.

Measured in one pass with the right answer as input: an answer counts when each of its tokens and
the closing one is the most likely after those before it. Greedy decoding returns the right answer
in exactly these cases, so this is its exact match.
"""

from typing import Any

import torch

from bench.tasks import data, documents, questions
from bench.tasks.data import Batch
from bench.tasks.pictures import Split
from bench.training.trainer import Trainer, family_counts

PASSKEY_DIGITS = (5, 16, 32, 64)


def _documents(level: int) -> int:
    return max(1, min(20, 6000 // data.TEXT_LEVELS[level].tokens))


def _picture_batches(split: Split, level: int, contexts: int) -> list[Batch]:
    size = 20
    return [data.picture_batch(1, split, step, level, size) for step in range(-(-contexts // size))]


def _text_batches(split: Split, level: int, contexts: int) -> list[Batch]:
    size = min(_documents(level), contexts)
    return [data.text_batch(1, split, step, level, size) for step in range(-(-contexts // size))]


def _passkey_batches(split: Split, level: int, digits: int, contexts: int) -> list[Batch]:
    rules, size = data.TEXT_LEVELS[level], min(_documents(level), contexts)
    batches = []
    for step in range(-(-contexts // size)):
        rng = data.generator(2, split, "text", step)
        rows = []
        for _ in range(size):
            document = documents.write(
                rng,
                families=("passkey",),
                tokens=rules.tokens,
                most_digits=digits,
                most_keys=2,
                most_items=2,
                most_words=2,
                fewest_digits=digits,
            )
            rows.append((data.prompt(0, document.text), document.questions))
        batches.append(data.pack(rows, None))
    return batches


def _accuracy(trainer: Trainer, batches: list[Batch]) -> dict[str, tuple[int, int]]:
    right: dict[str, int] = {}
    asked: dict[str, int] = {}
    for batch in batches:
        correct, total = family_counts(batch, trainer.answer(batch)[1])
        for family, number in total.items():
            asked[family] = asked.get(family, 0) + number
            right[family] = right.get(family, 0) + correct[family]
    return {family: (right[family], asked[family]) for family in asked}


@torch.no_grad()
def evaluate(
    trainer: Trainer,
    *,
    split: Split = "test",
    contexts: int = 200,
    picture_level: int | None = None,
    text_level: int | None = None,
) -> dict[str, Any]:
    """Return the accuracy and number of questions of each family.

    Args:
        trainer: Holder of the model.
        split: Part of the data; `train` is not held out.
        contexts: Pictures and documents to ask about.
        picture_level: Level of the pictures; the one that training reached when None.
        text_level: Level of the documents; the one that training reached when None.
    """
    reached = trainer.curriculum.levels
    picture_level = reached["picture"] if picture_level is None else picture_level
    text_level = reached["text"] if text_level is None else text_level
    counts = _accuracy(trainer, _picture_batches(split, picture_level, contexts))
    counts |= _accuracy(trainer, _text_batches(split, text_level, contexts))
    rules = data.TEXT_LEVELS[text_level]
    for digits in PASSKEY_DIGITS:
        if digits <= rules.most_digits:
            batches = _passkey_batches(split, text_level, digits, -(-contexts // 4))
            counts[f"passkey, {digits} digits"] = _accuracy(trainer, batches)["passkey"]
    order = (*questions.PICTURE_FAMILIES, *documents.TEXT_FAMILIES)
    known = [name for name in order if name in counts]
    return {
        "split": split,
        "picture_level": picture_level,
        "text_level": text_level,
        "measure": "exact match of greedy answers, by one teacher-forced pass",
        "families": {
            name: {"accuracy": round(right / asked, 4), "questions": asked}
            for name, (right, asked) in (
                (name, counts[name]) for name in (*known, *(n for n in counts if n not in known))
            )
        },
    }
