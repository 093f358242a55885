"""Packed channels give the log-probs of a transformers loop with zeros in old keys and values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.cases import PACKED, ask_of
from tests.e2e.support import ROUNDING, Engine
from tests.oracle.asks import DESCRIBE, STORY, Answer, Ask, channels
from tests.oracle.loop import Oracle
from tests.oracle.request import assert_like_oracle
from tokenprune.demo.checkpoint import build_checkpoint
from tokenprune.policies import ChannelInputs
from tokenprune.policies.channels.think import Think

pytestmark = pytest.mark.vllm

HEAD_SIZE, BLOCK = 64, 32
STEPS = 60


@pytest.fixture(scope="module")
def wide_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose heads have 64 channels."""
    path = tmp_path_factory.mktemp("checkpoint") / "heads-of-64"
    return Path(build_checkpoint(path, head_dim=HEAD_SIZE))


@pytest.fixture(scope="module")
def wide_oracle(wide_heads: Path) -> Oracle:
    return Oracle(wide_heads)


@pytest.fixture(scope="module")
def wide_engine(wide_heads: Path) -> Iterator[Engine]:
    engine = Engine(wide_heads, allow_channel_pruning=True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def answers(wide_engine: Engine) -> dict[str, Answer]:
    """All cases in one batch, with a request that keeps everything."""
    found = wide_engine.ask(
        *(ask_of(case, STEPS) for case in PACKED), Ask(DESCRIBE, (1,), None, STEPS)
    )
    assert wide_engine.blocks_missing == 0
    return dict(zip([*(case.id for case in PACKED), "off"], found, strict=True))


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in PACKED])
def test_engine_equals_a_transformers_loop_with_the_same_channels_zeroed(
    answers: dict[str, Answer], wide_oracle: Oracle, case: Any
) -> None:
    ask = ask_of(case, STEPS)
    thinned = assert_like_oracle(wide_oracle, ask, answers[case.id]).thinned
    assert thinned is not None
    # the loop must have zeroed something, or it would equal a model without pruning
    assert all(count > 0 for count in thinned.counts.values())


def test_a_neighbour_that_keeps_everything_equals_the_loop(
    answers: dict[str, Answer], wide_oracle: Oracle
) -> None:
    assert_like_oracle(wide_oracle, Ask(DESCRIBE, (1,), None, STEPS), answers["off"])


def test_channels_change_the_answer_so_the_comparison_can_fail(
    wide_engine: Engine, answers: dict[str, Answer]
) -> None:
    (full,) = wide_engine.ask(Ask(STORY, max_tokens=STEPS))
    found = answers["half-of-the-keys"]
    assert not full.agrees_with(found)
    # the prompt is attended to with all channels, so the first token is exact
    assert full.tokens[0] == found.tokens[0]
    for token in full.logprobs[0].keys() & found.logprobs[0].keys():
        assert math.isclose(full.logprobs[0][token], found.logprobs[0][token], abs_tol=ROUNDING)


def test_engine_keeps_the_channels_that_float64_scores_keep(
    wide_engine: Engine, wide_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[list[int]]] = []
    select = Think.select_keys

    def recorded(self: Think, inputs: ChannelInputs, keep: int) -> torch.Tensor:
        kept = select(self, inputs, keep)
        found.append(kept.tolist())
        return kept

    monkeypatch.setattr(Think, "select_keys", recorded)
    ask = Ask(STORY, (), channels(), max_tokens=2)
    (answer,) = wide_engine.ask(ask)
    thinned = assert_like_oracle(wide_oracle, ask, answer).thinned
    assert thinned is not None
    expected = [[keys for keys, _ in thinned.chosen[layer]] for layer in sorted(thinned.chosen)]
    assert found == expected


@pytest.mark.proves("chunked prefill", "think")
def test_chunks_of_the_prompt_end_at_the_same_channels(
    wide_heads: Path, answers: dict[str, Answer]
) -> None:
    # chunks of 5 cut the window of 8, and the last one may hold a single row
    engine = Engine(
        wide_heads,
        prune_layers=[],
        max_num_batched_tokens=37,
        max_num_seqs=8,
        allow_channel_pruning=True,
    )
    try:
        cases = [c for c in PACKED if "visual" not in str(c.values[2]) and not c.values[1]]
        for case, in_chunks in zip(
            cases, engine.ask(*(ask_of(case, STEPS) for case in cases)), strict=True
        ):
            assert in_chunks.agrees_with(answers[case.id], ROUNDING), case.id
        assert engine.blocks_missing == 0
    finally:
        engine.close()
