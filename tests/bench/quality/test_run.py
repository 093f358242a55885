"""The command `bench.quality` without its server: arguments, errors, interruption."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.quality import run as quality
from bench.quality.cells import AXES, Cell
from bench.quality.store import SERVED, code_hash
from tokenprune.demo.builtin import FOLDER


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"max_position_embeddings": 2048}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_words_after_two_dashes_go_to_the_server() -> None:
    options = quality.parse(["--model", "m", "-n", "7", "--", "--dtype", "auto", "--", "x"])
    assert (options.n, options.serve) == (7, ["--dtype", "auto", "--", "x"])


@pytest.mark.parametrize("method", ["off", "random"])
def test_quick_is_smaller(method: str) -> None:
    full, quick, few = (quality.parse(more) for more in ([], ["--quick"], ["-n", "3"]))
    for axis in AXES:
        cell = Cell("", axis, method, 0.5)
        assert quality.questions_of(quick, cell) < quality.questions_of(full, cell)
        assert quality.questions_of(few, cell) == 3
    assert full.keep_ratios is None
    assert len(quick.keep_ratios) == 1


def test_errors_are_one_line_and_status_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quality.main(["--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "the model folder must hold config.json" in capsys.readouterr().out


@pytest.fixture
def signals() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_an_interrupted_run_ends_in_order_and_keeps_its_answers(
    number: signal.Signals,
    model: Path,
    tmp_path: Path,
    signals: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # as in a background job of a shell
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ended = []

    def ask_server(*given: Any, **_: Any) -> None:
        _, _, work, answers = given
        cell, asked = work[0]
        answers.add(cell, asked.index, SERVED, item=asked.digest, text="7")

        async def wait() -> None:
            try:
                asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), number)
                await asyncio.sleep(30)
            finally:
                ended.append(cell)

        asyncio.run(wait())

    monkeypatch.setattr(quality, "ask_server", ask_server)
    out = tmp_path / "out"
    arguments = ["--model", str(model), "--tasks", "digit", "-n", "2", "--out", str(out)]
    assert quality.main([*arguments, "--hf", "0"]) == 130
    assert "the same command goes on from here" in capsys.readouterr().out
    assert len(ended) == 1
    assert [path.name for path in out.iterdir()] == ["answers.jsonl"]
    assert len((out / "answers.jsonl").read_text().splitlines()) == 2


def test_the_built_in_model_is_the_default() -> None:
    options = quality.parse([])
    assert options.model == FOLDER
    assert {"random", "uniform", "transprune"} <= set(options.methods)


def test_the_code_that_answers_has_a_hash_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert code_hash() == code_hash()
    (tmp_path / "linked").mkdir()
    package = tmp_path / "package"
    (package / "demo").mkdir(parents=True)
    (package / "room").symlink_to("../linked")
    monkeypatch.setattr("tokenprune.__file__", str(package / "__init__.py"))
    hashes = []
    for name in ("__init__.py", "room/a.py", "demo/run.py", "notes.md", "room/b.py"):
        (package / name).write_text(f"# {name}\n")
        hashes.append(code_hash())
    # the demo starts servers and prunes nothing, and notes are no code
    assert hashes[1] == hashes[2] == hashes[3]
    assert len(set(hashes)) == 3


def test_an_unknown_axis_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        quality.parse(["--axes", "kv,heads"])
    assert "must be among visual, kv, channels, got heads" in capsys.readouterr().err
