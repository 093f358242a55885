"""VFlowOpt in the engine: the same rows and folded features as a loop, in chunks, from a cache."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.e2e.support import ROUNDING, Engine
from tests.oracle.asks import COMPARE, DESCRIBE, TEXT, Answer, Ask, image, vflowopt, visual
from tests.oracle.loop import Oracle
from tests.oracle.request import assert_like_oracle, layout_of
from tokenprune.policies import ImageInputs
from tokenprune.policies.visual.vflowopt import VFlowOpt

pytestmark = pytest.mark.vllm

STORY = "USER: <image>\nA first one. <image> Then another, <image>\nWhich was it?\nASSISTANT:"
# a chunk that ends in the middle of the image, if it may
LATE = "USER: " + " ".join(f"It was {i % 7} on day {i}." for i in range(12)) + f" {DESCRIBE}"
# the map of random weights is flat: few patches receive much more than the mean
CASES = {
    "defaults": Ask(DESCRIBE, (1,), vflowopt(0.25)),
    "keeps-all": Ask(DESCRIBE, (1,), vflowopt(1)),
    "some-key-patches": Ask(DESCRIBE, (2,), vflowopt(0.3, threshold=1.5, cell=3)),
    "entropy": Ask(DESCRIBE, (3,), vflowopt(0.3, threshold=1.5, alpha=2.0)),
    "less-entropy": Ask(DESCRIBE, (3,), vflowopt(0.3, threshold=1.5, alpha=-2.0)),
    "fractional-cells": Ask(DESCRIBE, (4,), vflowopt(0.5, threshold=1.2, cell=2.5)),
    "one-cell": Ask(DESCRIBE, (4,), vflowopt(0.1, cell=40)),
    "more-cells-than-rows": Ask(DESCRIBE, (4,), vflowopt(0.1, cell=1)),
    "stages": Ask(DESCRIBE, (5,), vflowopt(None, stages=[0.7, 0.5, 0.2])),
    "before-layer-0-alone": Ask(DESCRIBE, (5,), vflowopt(None, stages=[0.2, 1, 1])),
    "later-cuts-alone": Ask(DESCRIBE, (5,), vflowopt(None, stages=[1, 0.5, 0.5])),
    "own-layers": Ask(DESCRIBE, (5,), vflowopt(0.3, prune_layers=[2, 5])),
    "one-token-left": Ask(DESCRIBE, (6,), vflowopt(0.001)),
    "two-images": Ask(COMPARE, (1, 2), vflowopt(0.3, threshold=1.5)),
    "same-image-twice": Ask(COMPARE, (3, 3), vflowopt(0.2, threshold=1.5)),
    "three-images": Ask(STORY, (1, 7, 2), vflowopt(0.2, threshold=1.4, cell=4)),
    "text-in-front": Ask(LATE, (3,), vflowopt(0.3, threshold=1.5)),
    "off": Ask(COMPARE, (1, 2)),
    "text": Ask(TEXT),
    "transprune": Ask(DESCRIBE, (1,), visual("transprune", 0.25)),
}
CHUNKED = [name for name in CASES if name != "transprune"]


@pytest.fixture(scope="module")
def answers(engine: Engine) -> dict[str, Answer]:
    """All cases in one batch."""
    found = dict(zip(CASES, engine.ask(*CASES.values()), strict=True))
    assert engine.blocks_missing == 0
    return found


@pytest.mark.parametrize("name", CASES)
def test_engine_equals_a_transformers_loop_with_the_same_rows_and_folded_features(
    answers: dict[str, Answer], oracle: Oracle, name: str
) -> None:
    kept = assert_like_oracle(oracle, CASES[name], answers[name]).trace.kept
    assert bool(kept) == (name not in ("off", "text", "keeps-all"))


def test_a_batch_equals_each_request_alone(engine: Engine, answers: dict[str, Answer]) -> None:
    for name, ask in CASES.items():
        engine.llm.reset_prefix_cache()
        (alone,) = engine.ask(ask)
        assert alone.agrees_with(answers[name], ROUNDING), name
        assert engine.blocks_missing == 0


def test_parameters_change_the_answer_so_the_comparison_can_fail(
    engine: Engine, answers: dict[str, Answer]
) -> None:
    ask = CASES["some-key-patches"]
    assert ask.pruning is not None
    changes: list[dict[str, Any]] = [{"threshold": 0.0}, {"alpha": 5.0}, {"cell": 6}]
    others = [
        replace(ask, pruning=ask.pruning | vflowopt(0.3, cell=3) | vflowopt(0.3, **c))
        for c in changes
    ]
    for change, other in zip(changes, engine.ask(*others), strict=True):
        assert not other.agrees_with(answers["some-key-patches"]), change


def tower_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the images of each run of the vision tower."""
    model, runs = engine.runner.model, []
    embed = model.embed_multimodal

    def counted(**kwargs: Any) -> Any:
        runs.append(len(kwargs["pixel_values"]))
        return embed(**kwargs)

    monkeypatch.setattr(model, "embed_multimodal", counted)
    return runs


def test_an_image_in_the_encoder_cache_keeps_the_same_tokens_without_another_run(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    picked: list[list[list[int]]] = []
    select = VFlowOpt.select_image

    def recorded(self: VFlowOpt, inputs: ImageInputs) -> tuple[list[torch.Tensor], torch.Tensor]:
        stages, features = select(self, inputs)
        picked.append([stage.tolist() for stage in stages])
        return stages, features

    monkeypatch.setattr(VFlowOpt, "select_image", recorded)
    runs = tower_runs(engine, monkeypatch)
    ask = Ask(DESCRIBE, (20,), vflowopt(0.3, threshold=1.5))
    (first,) = engine.ask(ask)
    assert runs == [1]
    (second,) = engine.ask(ask)
    (elsewhere,) = engine.ask(Ask(COMPARE, (21, 20), ask.pruning))
    assert runs == [1, 1]
    assert first == second
    assert picked[0] == picked[1] == picked[3] != picked[2]
    assert elsewhere.tokens


def test_an_image_cached_without_scores_is_scored_by_one_more_run(
    engine: Engine, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tower_runs(engine, monkeypatch)
    engine.ask(Ask(DESCRIBE, (22,)))
    assert runs == [1]
    ask = Ask(DESCRIBE, (22,), vflowopt(0.3, threshold=1.5))
    for _ in range(2):
        (answer,) = engine.ask(ask)
        assert_like_oracle(oracle, ask, answer)
    assert runs == [1, 1]
    # other parameters of the map are another map of the image, from the same run
    for threshold in (2.5, 3.5):
        other = replace(ask, pruning=vflowopt(0.3, threshold=threshold, alpha=2.0))
        (answer,) = engine.ask(other)
        assert_like_oracle(oracle, other, answer)
    engine.ask(replace(ask, pruning=vflowopt(0.1, threshold=2.5, cell=3)))
    assert runs == [1, 1]


def test_requests_that_ask_for_no_scores_leave_none(engine: Engine) -> None:
    cache = engine.runner.encoder_cache
    before = dict(cache.scores)
    engine.ask(Ask(DESCRIBE, (30,), visual("uniform")), Ask(DESCRIBE, (31,)))
    assert cache.scores == before
    assert len(cache.encoder_outputs) > len(before)


def chunks_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the tokens of each step of a request."""
    scheduler, seen = engine.scheduler, []
    schedule = scheduler.schedule

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        seen.extend(output.num_scheduled_tokens.values())
        return output

    monkeypatch.setattr(scheduler, "schedule", watched)
    return seen


@pytest.mark.proves("chunked prefill", "vflowopt")
@pytest.mark.parametrize("name", CHUNKED)
def test_chunked_prefill_equals_prefill_in_one_step(
    answers: dict[str, Answer], cramped: Engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cramped.llm.reset_prefix_cache()
    chunks = chunks_of(cramped, monkeypatch)
    (answer,) = cramped.ask(CASES[name])
    assert answer.agrees_with(answers[name], ROUNDING)
    prefill = [n for n in chunks if n > 1]
    assert len(prefill) >= len(CASES[name].images)
    assert cramped.blocks_missing == 0


def test_chunks_end_outside_images(
    cramped: Engine, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = CASES["text-in-front"]
    _, rows = oracle.embed(ask.prompt, [image(s) for s in ask.images])
    spans = layout_of(rows).visual_spans
    inside = {p for start, end in spans for p in range(start + 1, end)}
    chunks = chunks_of(cramped, monkeypatch)

    def ends() -> set[int]:
        return set(itertools.accumulate(n for n in chunks if n > 1))

    cramped.ask(ask)
    assert len(ends()) >= 2
    assert not ends() & inside
    chunks.clear()
    cramped.ask(replace(ask, pruning=visual("uniform")))
    assert ends() & inside, "chunks of other methods are cut anywhere"


def test_all_requests_together_in_chunks_equal_each_alone(
    answers: dict[str, Answer], cramped: Engine
) -> None:
    asks = [CASES[name] for name in CHUNKED]
    for name, answer in zip(CHUNKED, cramped.ask(*asks), strict=True):
        assert answer.agrees_with(answers[name], ROUNDING), name
    assert cramped.is_idle


def test_maps_go_when_their_image_leaves_the_encoder_cache(cramped: Engine) -> None:
    cache = cramped.runner.encoder_cache
    ask = Ask(DESCRIBE, (50,), vflowopt(0.3))
    (first,) = cramped.ask(ask)
    (name,) = list(cache.scores)[-1:]
    # it holds the tokens of a few images
    for seed in range(60, 75):
        cramped.ask(Ask(DESCRIBE, (seed,), vflowopt(0.3), max_tokens=1))
    assert name not in cache.scores
    assert set(cache.scores) <= set(cache.encoder_outputs)
    (again,) = cramped.ask(ask)
    assert again.agrees_with(first, ROUNDING)
