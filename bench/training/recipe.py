"""What a training run is made of: its settings, and the data of each of its steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.tasks import data
from bench.tasks.data import Batch

WINDOW = 50
"""Steps between two lines of the log and two looks at the curriculum."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, given the same library and device.

    Attributes:
        seed: Seed of data and weights.
        tower_steps: Steps of the first phase, the tower on patch labels.
        steps: Steps of the second phase, the decoder behind the frozen tower.
        tower_size: Pictures in a step of the first phase.
        picture_tokens: Tokens of pictures and their questions in a step of the second phase, about.
        text_tokens: Tokens of documents and their questions in such a step, about.
        rate: Highest learning rate of AdamW: embeddings, heads, norms and biases.
        matrix_rate: Highest learning rate of Muon: the matrices inside the layers.
        warmup: Steps until the highest rate, in both phases.
        decay: Share of each phase, its last, in which the rate falls to nothing.
        chat: Share of batches whose questions follow one another as turns.
        threshold: Accuracy of every family at which a track goes up one level.
        patience: Steps after which it goes up anyway.
        half: Compute in bfloat16 where autocast does.
    """

    seed: int = 0
    tower_steps: int = 2000
    steps: int = 5000
    tower_size: int = 32
    picture_tokens: int = 6000
    text_tokens: int = 5000
    rate: float = 2e-3
    matrix_rate: float = 0.02
    warmup: int = 100
    decay: float = 0.25
    chat: float = 0.1
    threshold: float = 0.92
    patience: int = 500
    half: bool = False


def make_batches(plan: tuple[Any, ...]) -> Any:
    """Make the data of one step; runs in worker processes too."""
    if plan[0] == "tower":
        _, seed, step, clutter, size = plan
        return data.tower_batch(seed, "train", step, clutter, size)
    _, recipe, step, levels = plan
    return decoder_batches(recipe, step, levels)


def decoder_batches(
    recipe: Recipe, step: int, levels: dict[str, int]
) -> dict[str, tuple[int, Batch]]:
    """Return one batch of each track with its level."""
    chat = np.random.default_rng([recipe.seed, 98, step]).random(2) < recipe.chat
    level = levels["text"]
    pictures = max(1, recipe.picture_tokens // data.PICTURE_LEVELS[levels["picture"]].length)
    documents = max(1, recipe.text_tokens // data.TEXT_LEVELS[level].length)
    return {
        "picture": (
            levels["picture"],
            data.picture_batch(
                recipe.seed,
                "train",
                step,
                levels["picture"],
                pictures,
                chat=bool(chat[0]),
            ),
        ),
        "text": (
            level,
            data.text_batch(recipe.seed, "train", step, level, documents, chat=bool(chat[1])),
        ),
    }


def windows(first: int, last: int) -> Iterator[int]:
    """Yield how many steps to do until each end of a window, from `first` to `last`."""
    while first < last:
        steps = min(WINDOW - first % WINDOW, last - first)
        yield steps
        first += steps
