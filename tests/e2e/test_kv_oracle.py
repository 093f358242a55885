"""Evicting KV gives the log-probs of a transformers loop that holds just those keys and values."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.e2e.cases import EVICTED, ask_of
from tests.e2e.support import ROUNDING, Engine
from tests.oracle.asks import DESCRIBE, STORY, Answer, Ask, kv
from tests.oracle.kv import Evicted, lag_choice
from tests.oracle.loop import Oracle
from tests.oracle.request import assert_like_oracle
from tokenprune.kernels import lag_keep
from tokenprune.policies import Segments

pytestmark = pytest.mark.vllm

CHUNK = 64


@pytest.fixture(scope="module")
def chunked(lend: Callable[..., Engine]) -> Engine:
    """An engine without stages that cuts prompts into small chunks."""
    return lend(prune_layers=[], max_num_batched_tokens=CHUNK, max_num_seqs=8)


@pytest.fixture(scope="module")
def answers(engine: Engine) -> dict[str, Answer]:
    """All cases in one batch, with a request that evicts nothing."""
    found = engine.ask(*map(ask_of, EVICTED), Ask(DESCRIBE, (1,), None, 40))
    assert engine.blocks_missing == 0
    return dict(zip([*(case.id for case in EVICTED), "off"], found, strict=True))


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in EVICTED])
def test_engine_equals_a_transformers_loop_that_holds_the_same_keys_and_values(
    answers: dict[str, Answer], oracle: Oracle, case: Any
) -> None:
    ask = ask_of(case)
    found = assert_like_oracle(oracle, ask, answers[case.id])
    assert ask.pruning is not None
    assert found.evicted is not None
    if ask.pruning["pruning_kv_keep_ratio"] < 1:
        shrinks = sum(b < a for a, b in itertools.pairwise(found.evicted.lengths))
        assert shrinks >= 2, "generated tokens must be evicted several times"


def test_a_neighbour_that_evicts_nothing_equals_the_loop(
    answers: dict[str, Answer], oracle: Oracle
) -> None:
    assert_like_oracle(oracle, Ask(DESCRIBE, (1,), None, 40), answers["off"])


@pytest.mark.proves("chunked prefill", "lagkv", "streaming")
@pytest.mark.parametrize("method", ["lagkv", "streaming"])
def test_evicting_after_each_chunk_equals_the_loop_in_chunks(
    chunked: Engine, oracle: Oracle, method: str
) -> None:
    ask = Ask(STORY, (), kv(method, when="chunk"), max_tokens=40)
    # after a cached prefix other chunks would follow
    chunked.llm.reset_prefix_cache()
    (answer,) = chunked.ask(ask)
    found = assert_like_oracle(oracle, ask, answer, chunk=CHUNK)
    assert found.evicted is not None
    assert len(found.evicted.lengths) > 40 + 1, "the prompt must take several steps"


def test_evicting_at_the_prompt_end_does_not_depend_on_the_chunk_size(
    answers: dict[str, Answer], chunked: Engine
) -> None:
    cases = [c for c in EVICTED if c.id in ("lagkv-text", "streaming", "random")]
    for case, in_chunks in zip(cases, chunked.ask(*map(ask_of, cases)), strict=True):
        assert in_chunks.agrees_with(answers[case.id], ROUNDING), case.id
    assert chunked.blocks_missing == 0


def test_engine_keeps_the_tokens_that_float64_scores_keep(
    engine: Engine, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenprune.policies.kv.lagkv import LagKV

    found: dict[tuple[int, int, int], list[int]] = {}
    score = LagKV.score

    def recorded(self: LagKV, segments: Segments) -> torch.Tensor:
        scores = score(self, segments)
        for head, partitions in enumerate(lag_keep(scores, 4).tolist()):
            for p, ranks in enumerate(partitions):
                found[segments.layer, head, segments.first + p] = ranks
        return scores

    monkeypatch.setattr(LagKV, "score", recorded)
    ask = Ask(STORY, (), kv("lagkv"), max_tokens=40)
    (answer,) = engine.ask(ask)
    expected: dict[tuple[int, ...], list[int]] = {}
    choice = lag_choice(4)

    def choose(*arguments: Any) -> list[int]:
        expected[arguments[-3:]] = choice(*arguments)
        return expected[arguments[-3:]]

    oracle.run(STORY, [], answer.tokens, None, Evicted(4, 16, 4, choose))
    assert found == expected


def test_eviction_changes_the_answer_so_the_comparison_can_fail(
    answers: dict[str, Answer],
) -> None:
    full = answers["lagkv-keeps-all"]
    assert not any(full.agrees_with(answers[i]) for i in ("lagkv-text", "streaming", "random"))
