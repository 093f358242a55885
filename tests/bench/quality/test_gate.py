"""The gate of `--quick` on the built-in model, through the real engine, and that it can fail."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.quality.gate import GATE_POINTS, RECORD
from bench.quality.output import FIGURES
from bench.tasks.held_out import TASKS
from tokenprune.demo.builtin import FOLDER

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 900

Done = subprocess.CompletedProcess[str]


def quick(*arguments: str | Path) -> Done:
    """Run the command as a user does."""
    command = [sys.executable, "-m", "bench.quality", "--quick", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    out = tmp_path_factory.mktemp("quality")
    return quick("--out", out), out


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "model"))


def change_record(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((model / RECORD).read_text())
    change(record)
    (model / RECORD).write_text(json.dumps(record))


def test_the_built_in_model_answers_as_recorded(measured: tuple[Done, Path]) -> None:
    done, _ = measured
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"No task lost more than {GATE_POINTS:g} points" in done.stdout


def test_the_gate_compares_answers_to_the_same_questions() -> None:
    record = json.loads((FOLDER / RECORD).read_text())
    assert "served" in record, "write it with: make quality ARGS=--record"
    assert set(record["served"]["first"]["accuracy"]) == set(TASKS)


def test_served_answers_are_those_of_transformers(measured: tuple[Done, Path]) -> None:
    with (measured[1] / FIGURES).open() as file:
        rows = [row for row in csv.DictReader(file) if not row["task"].startswith("all ")]
    checked = sum(int(row["hf_n"]) for row in rows)
    # float32 against float64 may decide a close call differently, once
    assert checked - 1 <= sum(int(row["hf_same"]) for row in rows)
    assert checked > len(TASKS)


def test_a_model_below_its_record_fails(measured: tuple[Done, Path], copied: Path) -> None:
    # the answers of the run above against a record that is too high for them
    def raise_accuracy(record: dict[str, Any]) -> None:
        first = record["served"]["first"]["accuracy"]
        first["digit"] += (GATE_POINTS + 1) / 100

    change_record(copied, raise_accuracy)
    done = quick("--model", copied, "--out", measured[1])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "unpruned accuracy of digit must be at least" in done.stdout
    assert "unpruned accuracy of shape" not in done.stdout


def test_damaged_weights_are_told_before_anything_starts(copied: Path) -> None:
    with (copied / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    done = quick("--model", copied)
    assert done.returncode == 2
    assert "must be the weights of accuracy.json" in " ".join(done.stdout.split())


def test_answers_of_another_model_are_refused(measured: tuple[Done, Path], copied: Path) -> None:
    config = copied / "generation_config.json"
    config.write_text(config.read_text() + "\n")
    change_record(copied, lambda record: record.pop("served"))
    before = (measured[1] / "answers.jsonl").read_bytes()
    done = quick("--model", copied, "--out", measured[1])
    assert done.returncode == 2
    assert "the model hash must be that of" in " ".join(done.stdout.split())
    assert (measured[1] / "answers.jsonl").read_bytes() == before
