"""Packed channels give the log-probs of a transformers loop with zeros in old keys and values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.oracle import Evicted, Oracle, Pruned, Thinned, lag_choice
from tests.e2e.support import (
    COMPARE,
    DESCRIBE,
    SHAPE,
    STORY,
    TOLERANCE,
    Answer,
    Ask,
    Engine,
    channels,
    image,
    kv,
    layout_of,
    policy_of,
    visual,
)
from tokenprune.demo.checkpoint import build_checkpoint
from tokenprune.policies import ChannelInputs
from tokenprune.policies.think import Think

pytestmark = pytest.mark.vllm

HEAD_SIZE, BLOCK = 64, 32
STEPS = 60


@pytest.fixture(scope="module")
def wide_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose heads have 64 channels."""
    path = tmp_path_factory.mktemp("checkpoint") / "heads-of-64"
    return Path(build_checkpoint(path, head_dim=HEAD_SIZE))


@pytest.fixture(scope="module")
def thin_oracle(wide_heads: Path) -> Oracle:
    return Oracle(wide_heads)


@pytest.fixture(scope="module")
def thin(wide_heads: Path) -> Iterator[Engine]:
    engine = Engine(wide_heads, allow_channel_pruning=True)
    yield engine
    engine.close()


def thinned_like(ask: Ask) -> Thinned | None:
    keys = {k.removeprefix("pruning_channels_"): v for k, v in (ask.pruning or {}).items()}
    if "method" not in keys:
        return None
    kept = int(keys["keep_ratio"] * HEAD_SIZE)
    values = int(keys.get("values_keep_ratio", 1) * HEAD_SIZE)
    tokens = BLOCK * 2 * HEAD_SIZE // (kept + values)
    generated = keys.get("pack_generated", True)
    return Thinned(kept, values, keys["window"], keys["recent"], tokens, generated)


def evicted_like(ask: Ask) -> Evicted | None:
    keys = {k.removeprefix("pruning_kv_"): v for k, v in (ask.pruning or {}).items()}
    if keys.get("method") != "lagkv":
        return None
    keep = max(1, int(keys["keep_ratio"] * keys["lag"]))
    return Evicted(keys["sink"], keys["lag"], keep, lag_choice(keep))


def assert_like_oracle(oracle: Oracle, ask: Ask, answer: Answer) -> Thinned | None:
    images = [image(s) for s in ask.images]
    _, rows = oracle.embed(ask.prompt, images)
    pruned = None
    keys = {k: v for k, v in (ask.pruning or {}).items() if k.startswith("pruning_visual")}
    if keys:
        policy = policy_of(keys)
        plan = policy.plan(layout_of(rows), SHAPE)
        stages = list(enumerate(SHAPE.boundaries))
        pruned = Pruned(
            cuts={b: plan.kept[i] for i, b in stages},
            ranks=None if plan.ranks is None else {b: list(plan.ranks[i]) for i, b in stages},
            observed=policy.observed_layers(SHAPE),
        )
    thinned = thinned_like(ask)
    trace = oracle.run(ask.prompt, images, answer.tokens, pruned, evicted_like(ask), thinned)
    for step, (expected, found) in enumerate(zip(trace.logprobs, answer.logprobs, strict=True)):
        for token, logprob in found.items():
            assert math.isclose(float(expected[token]), logprob, abs_tol=TOLERANCE), step
    return thinned


CASES = [
    pytest.param(STORY, (), channels(), id="half-of-the-keys"),
    pytest.param(STORY, (), channels(0.25), id="a-quarter-of-the-keys"),
    pytest.param(STORY, (), channels(0.75, values_keep_ratio=0.25), id="values-too"),
    pytest.param(STORY, (), channels(pack_generated=False), id="generated-tokens-stay"),
    pytest.param(STORY, (), channels(window=1, recent=0), id="one-query-and-none-recent"),
    pytest.param(STORY, (), channels() | kv("lagkv", 0.5), id="with-lagkv"),
    pytest.param(
        STORY, (), channels(values_keep_ratio=0.5) | kv("lagkv", 0.75), id="values-with-lagkv"
    ),
    pytest.param(DESCRIBE, (1,), channels(), id="image"),
    pytest.param(COMPARE, (1, 2), channels() | visual("uniform", 0.5), id="with-uniform"),
    pytest.param(
        COMPARE,
        (1, 2),
        channels() | kv("lagkv", 0.5) | visual("transprune", 0.5),
        id="all-three-axes",
    ),
]


def ask_of(case: Any) -> Ask:
    return Ask(*case.values, max_tokens=STEPS)


@pytest.fixture(scope="module")
def answers(thin: Engine) -> dict[str, Answer]:
    """All cases in one batch, with a request that keeps everything."""
    found = thin.ask(*map(ask_of, CASES), Ask(DESCRIBE, (1,), None, STEPS))
    assert thin.blocks_missing == 0
    return dict(zip([*(case.id for case in CASES), "off"], found, strict=True))


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_engine_equals_a_transformers_loop_with_the_same_channels_zeroed(
    answers: dict[str, Answer], thin_oracle: Oracle, case: Any
) -> None:
    ask = ask_of(case)
    thinned = assert_like_oracle(thin_oracle, ask, answers[case.id])
    assert thinned is not None
    # the loop must have zeroed something, or it would equal a model without pruning
    assert all(count > 0 for count in thinned.counts.values())


def test_a_neighbour_that_keeps_everything_equals_the_loop(
    answers: dict[str, Answer], thin_oracle: Oracle
) -> None:
    assert_like_oracle(thin_oracle, Ask(DESCRIBE, (1,), None, STEPS), answers["off"])


def test_channels_change_the_answer_so_the_comparison_can_fail(
    thin: Engine, answers: dict[str, Answer]
) -> None:
    (full,) = thin.ask(Ask(STORY, max_tokens=STEPS))
    found = answers["half-of-the-keys"]
    assert not full.agrees_with(found)
    # the prompt is attended to with all channels, so the first token is exact
    assert full.tokens[0] == found.tokens[0]
    for token in full.logprobs[0].keys() & found.logprobs[0].keys():
        assert math.isclose(full.logprobs[0][token], found.logprobs[0][token], abs_tol=2e-5)


def test_engine_keeps_the_channels_that_float64_scores_keep(
    thin: Engine, thin_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[list[int]]] = []
    select = Think.select_keys

    def recorded(self: Think, inputs: ChannelInputs, keep: int) -> torch.Tensor:
        kept = select(self, inputs, keep)
        found.append(kept.tolist())
        return kept

    monkeypatch.setattr(Think, "select_keys", recorded)
    ask = Ask(STORY, (), channels(), max_tokens=2)
    (answer,) = thin.ask(ask)
    thinned = assert_like_oracle(thin_oracle, ask, answer)
    assert thinned is not None
    expected = [[keys for keys, _ in thinned.chosen[layer]] for layer in sorted(thinned.chosen)]
    assert found == expected


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
        cases = [c for c in CASES if "visual" not in str(c.values[2]) and not c.values[1]]
        for case, in_chunks in zip(cases, engine.ask(*map(ask_of, cases)), strict=True):
            assert in_chunks.agrees_with(answers[case.id], 2e-5), case.id
        assert engine.blocks_missing == 0
    finally:
        engine.close()
