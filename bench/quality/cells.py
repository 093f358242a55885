"""What `bench.quality` measures: the axes of pruning, and the cells of its table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.tasks import documents, questions
from bench.tasks.held_out import TASKS
from tokenprune.errors import TokenPruneError
from tokenprune.policies import methods as methods_of
from tokenprune.presets import load_presets

OFF = "off"
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

# they look at no data, and every other method is held against them
BASELINES = tuple(
    dict.fromkeys(
        name for axis in AXES for name, policy in methods_of(axis).items() if policy.is_baseline
    )
)

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


def axes_of(task: str) -> tuple[str, ...]:
    """Return the axes that pruning is measured on with a task."""
    return tuple(name for name, axis in AXES.items() if task in axis.tasks)


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
        if "seed" in methods_of(self.axis)[self.method].model_fields:
            # one draw for all questions would measure that draw, not the method
            chosen["seed"] = index
        return {self.axis: chosen}


def all_methods() -> list[str]:
    """Return every method of every axis, the baselines first."""
    known = dict.fromkeys(method for a in AXES for method in (*methods_of(a), *VARIANTS[a]))
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
        shown = [axis for axis in axes_of(name) if axis in axes]
        cells += [Cell(name, axis, OFF, 1.0) for axis in shown[:1]]
        cells += [
            Cell(name, axis, method, ratio)
            for axis in shown
            for method in ordered
            for ratio in sorted(set(keep_ratios or AXES[axis].keep_ratios), reverse=True)
            if method in methods_of(axis)
            or ((variant := VARIANTS[axis].get(method)) and variant(ratio) is not None)
        ]
    return cells
