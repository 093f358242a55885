"""Both parts of the demo with stand-ins for their servers: what is printed, and what is saved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from bench.publish.demo_tables import tables
from tests.demo.figures import AFTER, BEFORE, quiz_rows, speed_rows
from tokenprune.demo import builtin, measure, quiz, run
from tokenprune.demo.report import WIDTH, parse_samples

Served = list[tuple[Path | None, list[str]]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Served:
    models: Served = []

    @contextmanager
    def served(
        _: Console, model: Path | None, arguments: Sequence[str], log: Path
    ) -> Iterator[Any]:
        models.append((model, list(arguments)))
        pages = iter([BEFORE, AFTER] if model else [AFTER])
        yield SimpleNamespace(metrics=lambda: parse_samples(next(pages)))

    monkeypatch.setattr(run, "served", served)
    monkeypatch.setattr(builtin, "model_folder", lambda: tmp_path)
    monkeypatch.setattr(builtin, "recorded_sha256", lambda: "abc")
    monkeypatch.setattr("tokenprune.demo.checkpoint.cached_checkpoint", lambda _: tmp_path)
    monkeypatch.setattr(quiz, "ask_questions", lambda *_: quiz_rows())
    monkeypatch.setattr(measure, "measure", lambda *_: speed_rows())
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return models


def test_both_parts_are_shown_within_the_width_and_saved(
    started: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "demo.json"
    run.run_demo(["--json", str(file)])
    # the first serves whatever `serve` serves without a model
    assert [model for model, _ in started] == [None, tmp_path]
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= WIDTH
    assert "transprune: 44/48 right against 46/48 unpruned" in shown
    assert "transprune: 2.3x fewer KV blocks" in shown
    record = json.loads(file.read_text())
    assert record["answers"]["weights"] == "abc"
    assert record["answers"]["rows"][0]["num_right"] == 46
    assert record["speed"]["rows"][0]["tokens_per_second_median"] == 29
    assert str(tmp_path) not in file.read_text()
    # the README's tables come from this record
    page = tables(record)
    assert "46/48" in page
    assert "0.50x" in page
