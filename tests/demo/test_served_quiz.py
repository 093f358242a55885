"""`tokenprune serve` without a model, asked the demo's questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenprune.demo import quiz
from tokenprune.demo.local_server import LocalServer
from tokenprune.demo.quiz_report import quiz_verdict


@pytest.mark.vllm
def test_the_built_in_model_answers_and_pruning_saves_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # other modules keep the engine in their own process, which a server does not
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    questions = quiz.load_questions()
    with LocalServer(None, ["--no-enable-prefix-caching"], tmp_path / "log") as server:
        server.wait_until_ready()
        assert "built-in tokenprune-demo" in server.log.read_text()
        rows = quiz.ask_questions(server, questions, 0.25, lambda: None)
    line, is_good = quiz_verdict(rows)
    assert is_good, line
