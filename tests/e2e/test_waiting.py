"""Methods that choose from the whole prompt take it in chunks like any other; nobody waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.e2e.support import ROUNDING, Engine, abort, drain, internal_id, preemptions, start, step
from tests.oracle.asks import COMPARE, DESCRIBE, TEXT, Ask, channels, kv, visual

pytestmark = pytest.mark.vllm

LONG = "USER: <image>\nand\n<image>\nand\n<image>\nand\n<image>\nWhich one is it?\nASSISTANT:"
AFTER_TEXT = "SYSTEM: " + "You look at pictures and answer. " * 6 + DESCRIBE
# steps of 37 tokens end in the middle of pictures and of the question after the last one
CHUNKS: dict[str, Any] = {
    "max_num_batched_tokens": 37,
    "max_num_seqs": 8,
    "max_num_waiting_tokens": 700,
    "allow_channel_pruning": True,
    "max_model_len": 768,
}
ASKS = [
    Ask(COMPARE, (5, 6), visual("transprune", 0.25)),
    Ask(COMPARE, (5, 6), visual("transprune", 0.05, form="paper")),
    Ask(DESCRIBE, (3,), visual("transprune", 0.2, alpha=1.0)),
    Ask(COMPARE, (2, 7), visual("transprune", 0.05, prune_layers=[0, 3])),
    Ask(COMPARE, (2, 7), visual("transprune", 0.3, prune_layers=[0])),
    Ask(DESCRIBE, (4,), visual("transprune", 0.01, prune_layers=[5])),
    Ask(DESCRIBE, (4,), visual("transprune", 1.0)),
    Ask(LONG, (1, 2, 3, 4), visual("transprune", 0.1), 12),
    # text goes ahead, and its keys are read again in the cache
    Ask(AFTER_TEXT, (5,), visual("transprune", 0.2)),
    Ask(AFTER_TEXT, (5,), visual("transprune", 0.2, prune_layers=[0, 5]) | kv("lagkv", 0.5)),
    # the released code evicts what a chunk leaves; only at the prompt's end chunks do not matter
    Ask(COMPARE, (1, 2), visual("transprune") | kv("lagkv", when="prompt_end"), 24),
    Ask(COMPARE, (1, 2), visual("transprune", 0.5) | channels() | kv("streaming", 0.5), 24),
    Ask(DESCRIBE, (1,)),
    Ask(TEXT, max_tokens=24),
]


@pytest.fixture(scope="module")
def whole(lend: Callable[..., Engine]) -> Engine:
    return lend(allow_channel_pruning=True)


@pytest.fixture(scope="module")
def chunked(lend: Callable[..., Engine]) -> Engine:
    return lend(**CHUNKS)


@contextmanager
def scheduled(engine: Engine) -> Iterator[list[dict[str, int]]]:
    """Yield a list that grows by the tokens of each request in a step, by its id."""
    scheduler, seen = engine.scheduler, []
    schedule = scheduler.schedule

    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        seen.append({name.rsplit("-", 1)[0]: n for name, n in output.num_scheduled_tokens.items()})
        return output

    scheduler.schedule = recorded
    try:
        yield seen
    finally:
        del scheduler.schedule


def test_chunks_end_at_the_answers_of_one_step(whole: Engine, chunked: Engine) -> None:
    expected = whole.ask(*ASKS)
    for ask, answer in zip(ASKS, expected, strict=True):
        (alone,) = chunked.ask(ask)
        assert alone.agrees_with(answer, ROUNDING), ask
    for ask, answer, mixed in zip(ASKS, expected, chunked.ask(*ASKS), strict=True):
        assert mixed.agrees_with(answer, ROUNDING), ask
    assert chunked.is_idle


def test_whoever_comes_after_is_scheduled_as_after_an_unpruned_prompt(chunked: Engine) -> None:
    first = []
    for pruning in (None, visual("transprune")):
        with scheduled(chunked) as steps:
            for _ in range(4):
                start(chunked, Ask(TEXT, max_tokens=60))
            step(chunked, 4)
            long = start(chunked, Ask(COMPARE, (5, 6), pruning))
            small = start(chunked, Ask(TEXT, max_tokens=1))
            drain(chunked)
        first.append([next(i for i, s in enumerate(steps) if r in s) for r in (long, small)])
    assert first[0] == first[1]


def test_a_prompt_without_room_is_passed_over_and_keeps_its_place(
    whole: Engine, chunked: Engine
) -> None:
    # of 312 tokens each; there is room for two
    asks = [Ask(COMPARE, (i, 6), visual("transprune")) for i in range(4)]
    plain = Ask(TEXT, max_tokens=3)
    with scheduled(chunked) as steps:
        ids = [start(chunked, ask) for ask in (*asks, plain)]
        waiting = []
        while chunked.llm.llm_engine.has_unfinished_requests():
            step(chunked)
            waiting.append(chunked.rows_waiting)
    assert 0 < max(waiting) <= CHUNKS["max_num_waiting_tokens"]
    began = [next(i for i, s in enumerate(steps) if r in s) for r in ids]
    ended = [max(i for i, s in enumerate(steps) if s.get(r, 0) > 1) for r in ids[:4]]
    assert began[:4] == sorted(began[:4])
    assert began[2] > ended[0]
    assert began[4] < began[3]
    for answer, expected in zip(chunked.ask(*asks), whole.ask(*asks), strict=True):
        assert answer.agrees_with(expected, ROUNDING)


def test_rows_come_back_when_a_client_leaves_half_way(chunked: Engine) -> None:
    ids = [start(chunked, Ask(COMPARE, (i, 6), visual("transprune"))) for i in range(2)]
    step(chunked, 3)
    assert chunked.rows_waiting > 0
    abort(chunked, ids)
    drain(chunked)
    assert chunked.is_idle


def test_a_prompt_preempted_half_way_begins_again(whole: Engine, chunked: Engine) -> None:
    ask = Ask(COMPARE, (5, 6), visual("transprune", 0.25))
    (expected,) = whole.ask(ask)
    request = start(chunked, ask)
    step(chunked, 4)
    assert chunked.rows_waiting > 0
    scheduler = chunked.scheduler
    with preemptions(chunked) as preempted:
        victim = scheduler.requests[internal_id(chunked, request)]
        scheduler.running.remove(victim)
        scheduler._preempt_request(victim, 0.0)
        outputs = []
        while chunked.llm.llm_engine.has_unfinished_requests():
            outputs += chunked.llm.llm_engine.step()
    assert len(preempted) == 1
    (done,) = [o for o in outputs if o.finished]
    assert list(done.outputs[0].token_ids) == expected.tokens
    assert chunked.is_idle
