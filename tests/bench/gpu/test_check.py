"""What the GPU checks decide without a GPU or an engine."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import pytest

import tokenprune
from bench.gpu import check
from bench.gpu.vllm_checks import distance
from tests.oracle.asks import Answer
from tokenprune.installation import DISTRIBUTION


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(device="cpu", dtype="float32", out=tmp_path, limit=60)


def test_a_checkout_looks_installed(tmp_path: Path) -> None:
    check.look_installed(tmp_path)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert (found.metadata["Name"], found.version) == (DISTRIBUTION, tokenprune.__version__)
    assert {(e.group, e.name, e.value) for e in found.entry_points} == {
        ("vllm.general_plugins", "tokenprune", "tokenprune.plugin:register"),
        ("vllm.endpoint_plugins", "tokenprune", "tokenprune.server.endpoints:create"),
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("step", check.STEPS)
def test_every_step_has_a_command_in_this_python(
    options: argparse.Namespace, step: str, device: str
) -> None:
    options.device = device
    for command, environment in check.commands(step, options):
        assert command[0] == sys.executable
        assert all(isinstance(value, str) for value in environment.values())


def test_the_stock_engine_loads_no_plugin(options: argparse.Namespace) -> None:
    (_, stock), (_, ours) = check.commands("eager", options)
    assert stock["VLLM_PLUGINS"] == ""
    assert "VLLM_PLUGINS" not in ours


@pytest.mark.parametrize(
    ("code", "limit", "error"),
    [
        ("pass", 60, None),
        ("raise SystemExit(3)", 60, "ended with status 3"),
        ("import time; time.sleep(60)", 0.2, "took longer than 0 s"),
    ],
    ids=["good", "bad", "slow"],
)
def test_a_step_says_how_it_ended(
    options: argparse.Namespace,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    limit: float,
    error: str | None,
) -> None:
    options.limit = limit
    monkeypatch.setattr(check, "commands", lambda *_: [([sys.executable, "-c", code], {})])
    (record,) = check.run_step("eager", options, {})
    assert record["ok"] == (error is None)
    assert record["error"] == error


def answer(*steps: tuple[int, dict[int, float]]) -> Answer:
    return Answer([token for token, _ in steps], [logprobs for _, logprobs in steps])


TOLERANCE = 0.01
SAME = (1, {1: -0.5, 2: -1.0})
CASES: list[Any] = [
    pytest.param([SAME], [SAME], 0.0, id="equal"),
    pytest.param([SAME], [(1, {1: -0.7, 3: -1.0})], 0.2, id="shared-tokens-only"),
    pytest.param([(1, {1: -0.5, 2: -0.51})], [(2, {1: -0.51, 2: -0.5})], 0.01, id="a-tie"),
    pytest.param([SAME], [(2, {1: -0.5, 2: -0.49})], float("inf"), id="another-token"),
    pytest.param([SAME], [(7, {7: -0.1})], float("inf"), id="a-token-we-never-saw"),
    pytest.param(
        [(1, {1: -0.5, 2: -0.51}), (5, {5: -9.0})],
        [(2, {1: -0.51, 2: -0.5}), (5, {5: -1.0})],
        0.01,
        id="nothing-counts-after-a-tie",
    ),
]


@pytest.mark.parametrize(("ours", "theirs", "expected"), CASES)
def test_answers_are_compared_up_to_the_first_tie(ours: Any, theirs: Any, expected: float) -> None:
    assert distance(answer(*ours), answer(*theirs), TOLERANCE) == pytest.approx(expected)
