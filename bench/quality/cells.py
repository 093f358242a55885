"""What `bench.quality` asks: held-out questions by task, and the cells of its table."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.tasks import data, documents, questions
from tokenprune.errors import TokenPruneError
from tokenprune.policies import methods
from tokenprune.presets import load_presets

OFF = "off"
BASELINES = ("random", "uniform", "streaming")
# what the transformers loop knows how to drop; other axes have no check yet
HF_AXES = ("visual",)
# documents are shorter than two partitions of the default size; the paper advises 128 or more
KV_PARAMETERS = {"sink": 16, "lag": 128}


@dataclass(frozen=True)
class Axis:
    """How an axis of pruning is measured.

    Attributes:
        tasks: What is asked; a document has no visual tokens to lose, and a picture prompt is too
            short to tell KV methods apart.
        keep_ratios: Shares asked for.
        n: Questions a cell, unpruned.
        pruned_n: Questions a cell where pruned; a document takes as long as five pictures.
        quick_n: The same with --quick, which is about the unpruned model.
    """

    tasks: tuple[str, ...]
    keep_ratios: tuple[float, ...]
    n: int
    pruned_n: int
    quick_n: int


# each has results of its own: what a change cannot touch need not be asked again
AXES = {
    "visual": Axis(questions.PICTURE_FAMILIES, (0.5, 0.25, 0.1), 500, 300, 15),
    "kv": Axis(documents.TEXT_FAMILIES, (0.5, 0.25, 0.125), 500, 200, 8),
    # heads of 32 channels keep 16 at any ratio from a quarter to three quarters
    "channels": Axis(documents.TEXT_FAMILIES, (0.5,), 200, 200, 4),
}

# presets that `bench.calibration` wrote
CALIBRATED = Path(__file__).parents[1] / "results" / "calibration"


@cache
def calibrated(keep_ratio: float) -> dict[str, Any] | None:
    """Return the preset of a keep ratio; None where there is none."""
    name = f"vflowopt-{keep_ratio:g}"
    path = CALIBRATED / f"{name}.yaml"
    return dict(load_presets(path)[name]) if path.is_file() else None


def _composed(keep_ratio: float) -> dict[str, Any]:
    # partitions small enough for a picture prompt
    return {
        "visual": {"method": "transprune", "keep_ratio": keep_ratio},
        "kv": {"method": "lagkv", "keep_ratio": 0.5, "sink": 16, "lag": 32},
        "channels": {"method": "think", "keep_ratio": 0.5},
    }


def _evicted_and_packed(keep_ratio: float) -> dict[str, Any]:
    return {
        "kv": {"method": "lagkv", "keep_ratio": 0.5, **KV_PARAMETERS},
        "channels": {"method": "think", "keep_ratio": keep_ratio},
    }


# rows that are more than one method with one keep ratio
VARIANTS: dict[str, dict[str, Callable[[float], dict[str, Any] | None]]] = {
    "visual": {"vflowopt-cal": calibrated, "all-axes": _composed},
    "kv": {},
    "channels": {"lagkv+think": _evicted_and_packed},
}


@dataclass(frozen=True)
class Task:
    """One family of questions.

    Attributes:
        name: As in the training data.
        max_tokens: Room for the longest answer; the trained model ends earlier by itself.
    """

    name: str
    max_tokens: int

    @property
    def axes(self) -> tuple[str, ...]:
        """What pruning is measured on."""
        return tuple(name for name, axis in AXES.items() if self.name in axis.tasks)


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


@dataclass(frozen=True)
class Cell:
    """One row of the table: a task, and how its prompts are pruned.

    Attributes:
        task: Name of the task.
        axis: What is pruned; for `off` the task's first axis, whose tokens are counted.
        method: Name of the method on that axis, or `off`.
        keep_ratio: Share kept after the last cut; 1 for `off`.
    """

    task: str
    axis: str
    method: str
    keep_ratio: float

    def pruning(self, index: int) -> str | dict[str, Mapping[str, Any]]:
        """Return the request field for question `index`."""
        if self.method == OFF:
            return OFF
        if variant := VARIANTS[self.axis].get(self.method):
            fields = variant(self.keep_ratio)
            assert fields is not None, "make_cells leaves it out"
            return fields
        chosen: dict[str, Any] = {"method": self.method, "keep_ratio": self.keep_ratio}
        if self.axis == "kv":
            chosen |= KV_PARAMETERS
        if "seed" in methods(self.axis)[self.method].model_fields:
            # one draw for all questions would measure that draw, not the method
            chosen["seed"] = index
        return {self.axis: chosen}


def all_methods() -> list[str]:
    """Return every method of every axis, the baselines first."""
    known = dict.fromkeys(method for a in AXES for method in (*methods(a), *VARIANTS[a]))
    return [*BASELINES, *(method for method in known if method not in BASELINES)]


def make_cells(
    tasks: Sequence[str],
    methods: Sequence[str],
    keep_ratios: Sequence[float] | None = None,
    axes: Sequence[str] = tuple(AXES),
) -> list[Cell]:
    """Return every row: a method goes where one of the task's `axes` has it, `off` everywhere.

    `off` and the baselines are in every table, asked for or not. Without `keep_ratios` they are
    those of the axis.

    Raises:
        TokenPruneError: A task, method or keep ratio is unknown or out of range.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise TokenPruneError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    known = {*all_methods(), OFF}
    for method in methods:
        if method not in known:
            raise TokenPruneError(f"unknown method {method!r}; known: {', '.join(sorted(known))}")
    for ratio in keep_ratios or ():
        if not 0 < ratio < 1:
            raise TokenPruneError(f"keep ratios must be in (0, 1), got {ratio:g}")
    ordered = dict.fromkeys((*BASELINES, *(m for m in methods if m != OFF)))
    cells = []
    for name in tasks:
        shown = [axis for axis in TASKS[name].axes if axis in axes]
        cells += [Cell(name, axis, OFF, 1.0) for axis in shown[:1]]
        cells += [
            Cell(name, axis, method, ratio)
            for axis in shown
            for method in ordered
            for ratio in sorted(set(keep_ratios or AXES[axis].keep_ratios), reverse=True)
            if method in methods(axis)
            or ((variant := VARIANTS[axis].get(method)) and variant(ratio) is not None)
        ]
    return cells
