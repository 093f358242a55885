"""Requests that ask for nothing get exactly what stock vLLM gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.support import Engine
from tests.oracle.asks import DESCRIBE, Ask, visual
from tests.oracle.stock import REQUESTS, answers, stock_answers

pytestmark = pytest.mark.vllm


def test_without_pruning_tokens_and_logprobs_are_stock_vllms_bit_for_bit(
    engine: Engine, checkpoint: Path
) -> None:
    stock = stock_answers(checkpoint, "v2")
    ours = json.loads(json.dumps(answers(engine)))
    assert ours == stock


def test_without_pruning_greedy_answers_are_those_of_plain_vllm_on_a_cpu(
    engine: Engine, checkpoint: Path
) -> None:
    stock = stock_answers(checkpoint, "v1")
    for (_, _, params), theirs, ours in zip(REQUESTS, stock, answers(engine), strict=True):
        if params["temperature"]:
            continue  # the two runners draw random numbers differently
        ((tokens, logprobs),), ((stock_tokens, stock_logprobs),) = ours, theirs
        assert tokens == stock_tokens
        for step, stock_step in zip(logprobs, stock_logprobs, strict=True):
            assert dict(step) == pytest.approx(dict(map(tuple, stock_step)), abs=1e-6)


def test_keeping_everything_through_the_physical_path_changes_no_bit(engine: Engine) -> None:
    for seed in (1, 2):
        (full,) = engine.ask(Ask(DESCRIBE, (seed,), max_tokens=16))
        for method in ("uniform", "random", "transprune"):
            (kept,) = engine.ask(Ask(DESCRIBE, (seed,), visual(method, 1.0), max_tokens=16))
            assert kept == full, method
