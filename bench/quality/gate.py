"""The accuracy on record beside the weights: `accuracy.json`, and what falls below it.

`bench.training.export` writes the file with `weights` (file and hash), `reached` and `easier`
(levels of the questions, accuracy by family). `bench.quality --record` adds `served`: the unpruned
accuracy through the engine, over all its questions and over the first ones, which --quick asks
again. So the gate compares answers to the same questions, and luck of the draw cannot trip it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.common import write_whole
from bench.quality.cells import OFF
from bench.quality.report import Row
from bench.tasks.held_out import Levels
from tokenprune.errors import TokenPruneError

RECORD = "accuracy.json"
QUICK_N = 100
GATE_POINTS = 2.0
_WAY_OUT = "write it with: python -m bench.quality --record"

Record = dict[str, Any]


def read_record(folder: Path) -> Record | None:
    """Return the record, or None where there is none.

    Raises:
        TokenPruneError: It is damaged, or of other weights.
    """
    path = folder / RECORD
    try:
        record: Record = json.loads(path.read_text())
        weights = folder / record["weights"]["file"]
        expected = record["weights"]["sha256"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise TokenPruneError(f"{path} must be an accuracy record, got {error!r}") from None
    found = _digest(weights) if weights.is_file() else "no such file"
    if found != expected:
        raise TokenPruneError(
            f"{weights} must be the weights of {RECORD}, {expected[:12]}, got {found[:12]}; "
            "the file is damaged, or the record is of another model"
        )
    return record


def levels_of(record: Record | None) -> Levels:
    """Return the difficulty that the model reached in training, or the hardest."""
    reached = (record or {}).get("reached")
    return Levels() if reached is None else Levels(reached["picture_level"], reached["text_level"])


def expected(
    record: Record | None, model: str, seed: int, levels: Levels, n: int
) -> dict[str, float]:
    """Return the recorded accuracy by task.

    Answers to the same questions where there are some, else what training measured on others.

    Raises:
        TokenPruneError: Nothing is recorded, or the served accuracy is of another model.
    """
    record = record or {}
    served = record.get("served")
    if served is not None and served["model"] != model:
        raise TokenPruneError(
            f"the served accuracy in {RECORD} must be of the model beside it, {model[:12]}, "
            f"got {served['model'][:12]}; {_WAY_OUT}"
        )
    asked = (seed, levels.picture, levels.text)
    if served is not None and asked == _asked(served):
        few = served["first"]
        part = few if few["questions"] == n else served
        return {task: float(value) for task, value in part["accuracy"].items()}
    if "reached" in record:
        families = record["reached"]["families"]
        return {task: float(row["accuracy"]) for task, row in families.items()}
    raise TokenPruneError(f"{RECORD} must hold the accuracy of these questions; {_WAY_OUT}")


def _asked(served: Mapping[str, Any]) -> tuple[int, int, int]:
    return served["seed"], served["picture_level"], served["text_level"]


def add_served(
    folder: Path,
    record: Record | None,
    model: str,
    seed: int,
    levels: Levels,
    rows: Sequence[Row],
    first: Sequence[Row],
) -> None:
    """Write the unpruned accuracy of `rows`, and that of their first questions, to the record."""
    if record is None:
        weights = sorted(folder.glob("*.safetensors"))[0]
        record = {"weights": {"file": weights.name, "sha256": _digest(weights)}}
    served = {
        "model": model,
        "seed": seed,
        "picture_level": levels.picture,
        "text_level": levels.text,
        **_accuracy(rows),
        "first": _accuracy(first),
    }
    before = record.get("served", {})
    same = ("model", "seed", "picture_level", "text_level", "questions")
    if all(before.get(key) == served[key] for key in same):
        # the other axes' tasks were asked in a run of their own
        for new, old in ((served, before), (served["first"], before["first"])):
            new["accuracy"] = {**old["accuracy"], **new["accuracy"]}
    write_whole(folder / RECORD, json.dumps({**record, "served": served}, indent=2) + "\n")


def _accuracy(rows: Sequence[Row]) -> dict[str, Any]:
    unpruned = [row for row in rows if row.method == OFF]
    return {
        "questions": unpruned[0].n,
        "accuracy": {row.task: round(row.accuracy, 4) for row in unpruned},
    }


def drops(rows: Sequence[Row], recorded: Mapping[str, float]) -> list[str]:
    """Return a line for each task whose unpruned accuracy is too far below the recorded one."""
    lines = []
    for row in rows:
        if row.method != OFF:
            continue
        if row.task not in recorded:
            lines.append(f"{row.task} must be on record, is not; {_WAY_OUT}")
        # half a point of rounding in the fourth digit must not decide
        elif 100 * (recorded[row.task] - row.accuracy) > GATE_POINTS + 0.01:
            lines.append(
                f"unpruned accuracy of {row.task} must be at least "
                f"{100 * recorded[row.task] - GATE_POINTS:.1f} %, got {100 * row.accuracy:.1f} %"
            )
    return lines


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
