"""Batches of pictures or documents, each followed by several questions.

The questions of one context share it and do not see each other: the attention mask and the
positions make every question the first and only one after its context, as it is when served. So
ten questions cost little more than one. In chat batches they follow one another as turns instead.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.tasks import documents, pictures, questions
from bench.tasks.pictures import NUM_PATCHES, Split
from bench.tasks.vocabulary import BOS, EOS, IMAGE, PAD, encode

TRACKS = ("picture", "text", "tower")
FAMILIES = questions.PICTURE_FAMILIES + documents.TEXT_FAMILIES
QUESTIONS_PER_CONTEXT = 10
_PADDING, _CONTEXT = -1, 0
_ALIGNMENT = 8  # attention kernels with a mask want it


@dataclass(frozen=True)
class PictureLevel:
    """Difficulty of the picture track.

    Attributes:
        families: What is asked.
        fewest: Lower bound of digits and shapes in a picture.
        most: Upper bound of them, at most 8.
        boxes: Whether there may be a text box.
        clutter: Clutter levels to draw from.
        background: Share of the background patches that the decoder gets. Most of a picture is
            background, and among all of it the few patches that matter are not found; tokens keep
            the positions they have in the whole picture.
        most_pictures: Pictures in a prompt.
    """

    families: tuple[str, ...]
    fewest: int
    most: int
    boxes: bool
    clutter: tuple[int, ...]
    background: float = 1.0
    most_pictures: int = 1

    @property
    def length(self) -> int:
        """Tokens of a picture and its questions, about."""
        return int(NUM_PATCHES * self.background) + min(110, 50 + 12 * self.most)


@dataclass(frozen=True)
class TextLevel:
    """Difficulty of the text track; see `documents.write`."""

    tokens: int
    most_digits: int
    most_keys: int
    most_items: int
    most_words: int

    @property
    def length(self) -> int:
        """Tokens of a document and its questions, about."""
        return self.tokens * 3 // 4 + 160


_CONTENT = ("digit", "shape", "colour")
_ALL = questions.PICTURE_FAMILIES
PICTURE_LEVELS = (
    PictureLevel((*_CONTENT, "where"), 1, 4, False, (0,), background=0.05),
    PictureLevel(_ALL, 3, 7, True, (0, 1), background=0.1),
    PictureLevel(_ALL, 3, 8, True, (0, 1, 2), background=0.3),
    PictureLevel(_ALL, 3, 8, True, (0, 1, 2)),
    PictureLevel(_ALL, 3, 8, True, (0, 1, 2), most_pictures=2),
)
TEXT_LEVELS = (
    TextLevel(32, 5, 2, 3, 4),
    TextLevel(64, 8, 4, 5, 6),
    TextLevel(128, 16, 6, 7, 10),
    TextLevel(256, 32, 8, 9, 14),
    TextLevel(512, 48, 10, 9, 18),
    TextLevel(1024, 64, 12, 9, 20),
    TextLevel(1600, 64, 12, 9, 20),
)
LEVELS: dict[str, int] = {"picture": len(PICTURE_LEVELS), "text": len(TEXT_LEVELS)}


@dataclass(frozen=True)
class Batch:
    """Packed contexts and questions, `[B, L]` unless said otherwise.

    Attributes:
        ids: Tokens, padded on the right.
        positions: Position of each token in a prompt with its own question alone.
        segments: 0 for the context, 1... for the questions, -1 for padding; all 0 in a chat.
        answers: Which tokens are to be predicted.
        answer_segments: `[A]` question of each answer token, counted through the batch.
        families: `[Q]` index into `FAMILIES` of each question.
        pixels: `[N, 96, 96, 3]` uint8 of all pictures in order, or None.
        patches: Indices into the `N * 144` patches of those that `ids` has tokens for.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]
    answers: NDArray[np.bool_]
    answer_segments: NDArray[np.int64]
    families: NDArray[np.int64]
    pixels: NDArray[np.uint8] | None
    patches: NDArray[np.int64]


Asked = list[tuple[str, questions.Question]]


def generator(seed: int, split: Split, track: str, step: int) -> np.random.Generator:
    """Return the generator of one batch; no two arguments share a stream."""
    return np.random.default_rng([seed, pictures.SPLITS.index(split), TRACKS.index(track), step])


def prompt(num_pictures: int, text: str) -> list[int]:
    """Return the tokens of a prompt up to its question: pictures or a document."""
    ids = [BOS, *encode("USER:"), *([IMAGE] * NUM_PATCHES + encode("\n")) * num_pictures]
    return ids + (encode(f" {text}") if text else [])


def pack(
    contexts: list[tuple[list[int], Asked]],
    pixels: NDArray[np.uint8] | None,
    chat: bool = False,
    shown: NDArray[np.bool_] | None = None,
) -> Batch:
    """Lay out contexts and their questions.

    Args:
        contexts: Tokens from `prompt` with the questions that follow.
        pixels: Pictures of all contexts in order.
        chat: Let the questions follow one another as turns.
        shown: `[N, 144]`, which patches get tokens; all when None.
    """
    if shown is None:
        shown = np.ones((0 if pixels is None else len(pixels), NUM_PATCHES), np.bool_)
    unread = iter(shown.ravel().tolist())
    rows = []
    families: list[int] = []
    answer_segments: list[int] = []
    for context, asked in contexts:
        kept = [place for place, i in enumerate(context) if i != IMAGE or next(unread)]
        ids, positions = [context[place] for place in kept], list(kept)
        segments, answers = [_CONTEXT] * len(kept), [False] * len(kept)
        for number, (family, (question, answer)) in enumerate(asked, 1):
            opening = "USER: " if chat and number > 1 else " "
            asking = encode(f"{opening}{question}\nASSISTANT:")
            answering = [*encode(f" {answer}"), EOS]
            start = positions[-1] + 1 if chat else len(context)
            length = len(asking) + len(answering)
            ids += asking + answering
            positions += range(start, start + length)
            segments += [_CONTEXT if chat else number] * length
            answers += [False] * len(asking) + [True] * len(answering)
            answer_segments += [len(families)] * len(answering)
            families.append(FAMILIES.index(family))
        rows.append((ids, positions, segments, answers))
    longest = -(-max(len(ids) for ids, *_ in rows) // _ALIGNMENT) * _ALIGNMENT
    columns = [
        np.array([list(row) + [fill] * (longest - len(row)) for row in column])
        for column, fill in zip(zip(*rows, strict=True), (PAD, 0, _PADDING, False), strict=True)
    ]
    ids, positions, segments, answers = columns
    return Batch(
        ids,
        positions,
        segments,
        answers,
        np.array(answer_segments),
        np.array(families),
        pixels,
        np.flatnonzero(shown),
    )


def draw_picture(rng: np.random.Generator, split: Split, level: PictureLevel) -> pictures.Picture:
    number = int(rng.integers(level.fewest, level.most + 1))
    digits = int(rng.integers(max(0, number - 4), min(number, 6) + 1))
    return pictures.draw(
        rng,
        split,
        clutter=int(rng.choice(level.clutter)),
        num_digits=digits,
        num_shapes=number - digits,
        box=level.boxes and rng.random() < 0.8,
    )


def picture_batch(
    seed: int,
    split: Split,
    step: int,
    level: int,
    size: int,
    *,
    chat: bool = False,
    num_questions: int = QUESTIONS_PER_CONTEXT,
) -> Batch:
    """Return `size` prompts with one picture, or half as many with two."""
    rng = generator(seed, split, "picture", step)
    rules = PICTURE_LEVELS[level]
    several = rules.most_pictures > 1 and rng.random() < 0.5
    contexts, pixels, seen = [], [], []
    for _ in range(max(1, size // 2) if several else size):
        shown = [draw_picture(rng, split, rules) for _ in range(2 if several else 1)]
        asked: Asked = []
        for number, picture in enumerate(shown, 1):
            lead = f"in picture {number} " if several else ""
            drawn = questions.ask(rng, picture, rules.families, num_questions // len(shown))
            asked += [(family, (lead + text, answer)) for family, (text, answer) in drawn]
            pixels.append(picture.pixels)
            background = picture.labels["kind"] == 0
            seen.append(~background | (rng.random(NUM_PATCHES) < rules.background))
        contexts.append((prompt(len(shown), ""), asked))
    return pack(contexts, np.stack(pixels), chat, np.stack(seen))


def text_batch(
    seed: int,
    split: Split,
    step: int,
    level: int,
    size: int,
    *,
    chat: bool = False,
    families: tuple[str, ...] = documents.TEXT_FAMILIES,
) -> Batch:
    """Return `size` documents with their questions, of lengths up to the level's."""
    rng = generator(seed, split, "text", step)
    rules = TEXT_LEVELS[level]
    # one length a batch: little padding
    tokens = int(rng.integers(rules.tokens // 2, rules.tokens + 1))
    contexts = []
    for _ in range(size):
        document = documents.write(
            rng,
            families=families,
            tokens=tokens,
            most_digits=rules.most_digits,
            most_keys=rules.most_keys,
            most_items=rules.most_items,
            most_words=rules.most_words,
        )
        contexts.append((prompt(0, document.text), document.questions))
    return pack(contexts, None, chat)


def tower_batch(
    seed: int, split: Split, step: int, clutter: tuple[int, ...], size: int
) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.int64]]]:
    """Return pictures `[size, 96, 96, 3]` and the labels of their patches `[size, 144]`."""
    rng = generator(seed, split, "tower", step)
    level = PictureLevel((), 8, 8, True, clutter)
    shown = [draw_picture(rng, split, level) for _ in range(size)]
    names = pictures.PATCH_LABELS
    labels = {name: np.stack([picture.labels[name] for picture in shown]) for name in names}
    return np.stack([picture.pixels for picture in shown]), labels
