"""Engines in processes of their own: what they are started with, and what is said of a failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.small_llama import start

STUB = """
import json, os, sys
if "bad" in sys.argv:
    sys.exit("no such engine")
print("ready", flush=True)
names = ("TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER")
print(json.dumps([sys.argv[1:], [name for name in names if name in os.environ]]))
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "stub_bench.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "stub_bench"


def test_an_engine_gets_its_arguments_and_none_of_our_switches(
    bench: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with (tmp_path / "log").open("w+") as log, start(bench, "good", ["folder", 7], log) as child:
        assert json.loads(child.stdout.readline()) == [["--serve", "good", "folder", "7"], []]


def test_an_engine_that_does_not_start_is_named_with_its_log(bench: str, tmp_path: Path) -> None:
    with (
        (tmp_path / "log").open("w+") as log,
        pytest.raises(SystemExit, match="the bad engine must start, got:\nno such engine"),
    ):
        start(bench, "bad", [], log)
