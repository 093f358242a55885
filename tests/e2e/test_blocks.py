"""Blocks that pruning frees: as many as its lengths say, and as many as the worker reports."""

from __future__ import annotations

import itertools

import pytest

from tests.e2e.contract import CHANNEL_ASKS
from tests.e2e.support import Engine, abort, drain, internal_id, start, step
from tests.oracle.asks import COMPARE, STORY, Ask, channels, kv, visual

pytestmark = pytest.mark.vllm

LONG = "USER: " + " ".join(f"On day {i} it was {i % 7}." for i in range(90)) + "\nASSISTANT:"


def settled_blocks(engine: Engine, request_id: str) -> int:
    """Return the blocks that the settled length of a request needs."""
    name = internal_id(engine, request_id)
    computed = engine.scheduler.requests[name].num_computed_tokens
    lengths = engine.scheduler._plans[name].lengths.all_stages(computed)
    return sum(-(-lengths[group.kv_cache_spec.stage] // 32) for group in engine.groups)


def held_while_running(engine: Engine, ask: Ask) -> list[int]:
    """Return the blocks not in the pool after each step of one request."""
    request_id = start(engine, ask)
    held = []
    while engine.llm.llm_engine.has_unfinished_requests():
        step(engine)
        if engine.scheduler.running:
            held.append(engine.blocks_missing)
            request = engine.scheduler.requests[internal_id(engine, request_id)]
            assert request.num_computed_tokens > 0
    drain(engine)
    assert engine.blocks_missing == 0
    return held


def test_a_pruned_request_holds_the_blocks_of_its_physical_length(engine: Engine) -> None:
    held = {}
    for name, pruning in {"off": None, "pruned": visual("transprune", 0.125)}.items():
        request_id = start(engine, Ask(COMPARE, (3, 4), pruning, max_tokens=64))
        step(engine, 3)
        held[name] = engine.blocks_missing
        if pruning is not None:
            assert held[name] == settled_blocks(engine, request_id)
        abort(engine, [request_id])
        drain(engine)
    assert held["pruned"] < 0.7 * held["off"]


def test_blocks_return_to_the_pool_while_the_request_evicts(engine: Engine) -> None:
    request_id = start(engine, Ask(STORY, (), kv("lagkv", 0.125, lag=32), max_tokens=120))
    held = []
    while engine.llm.llm_engine.has_unfinished_requests():
        step(engine)
        if not engine.scheduler.running:
            break
        missing, settled = engine.blocks_missing, settled_blocks(engine, request_id)
        # what the last step emptied is given back when the next one is scheduled
        assert settled <= missing
        if len(held) > 1:
            assert missing <= settled + len(engine.groups)
        held.append(missing)
    drain(engine)
    assert engine.blocks_missing == 0
    assert held[0] > 2 * held[1], "the prompt's blocks must come back after the first step"
    assert any(b < a for a, b in itertools.pairwise(held[2:])), "and those of generated tokens"


def test_what_the_worker_counts_is_what_was_evicted(engine: Engine) -> None:
    def figures() -> tuple[float, float, int]:
        stats = engine.stats()
        tokens = stats["kv_tokens"].get("streaming", {"written": 0, "evicted": 0})
        return tokens["written"], tokens["evicted"], stats["kv_blocks_freed"].get("streaming", 0)

    before = figures()
    ask = Ask(STORY, (), kv("streaming", lag=16), 40)
    engine.llm.reset_prefix_cache()
    (answer,) = engine.ask(ask)
    written, evicted, freed = (b - a for a, b in zip(before, figures(), strict=True))
    computed = len(engine.llm.get_tokenizer().encode(STORY)) + len(answer.tokens) - 1
    assert written == computed
    assert evicted == ((computed - 4) // 16 - 1) * (16 - 4)
    assert freed > 0


def test_at_half_the_key_channels_a_long_prompt_holds_a_fifth_fewer_blocks(
    packing_engine: Engine,
) -> None:
    ask = Ask(LONG, max_tokens=100)
    packing_engine.llm.reset_prefix_cache()
    stock = held_while_running(packing_engine, ask)
    packed = Ask(LONG, (), channels(window=32, recent=32), 100)
    pruned = held_while_running(packing_engine, packed)
    assert len(stock) == len(pruned)
    # the prompt is held whole once, beside the blocks that its row moves to
    assert 0 < pruned[0] - stock[0] <= pruned[1]
    # from the step after the prompt on, also while generated tokens age
    for before, after in zip(stock[2:], pruned[2:], strict=True):
        assert after <= 0.8 * before


def test_the_worker_reports_the_bytes_of_blocks_it_does_without(packing_engine: Engine) -> None:
    packing_engine.llm.reset_prefix_cache()
    stock = held_while_running(packing_engine, Ask(LONG, max_tokens=8))[-1]
    request_id = start(packing_engine, Ask(LONG, (), channels(), max_tokens=8))
    step(packing_engine, 7)
    group = packing_engine.groups[0]
    page = group.kv_cache_spec.page_size_bytes * len(group.layer_names)
    saved = packing_engine.stats()["kv_bytes_saved"]
    assert saved == (stock - packing_engine.blocks_missing) * page > 0
    abort(packing_engine, [request_id])
    drain(packing_engine)
    assert packing_engine.stats()["kv_bytes_saved"] == 0
    assert packing_engine.blocks_missing == 0


def test_blocks_freed_are_counted_by_method(packing_engine: Engine) -> None:
    def freed(method: str) -> int:
        return int(packing_engine.stats()["kv_blocks_freed"].get(method, 0))

    before = freed("think"), freed("lagkv+think")
    both = channels() | kv("lagkv", 0.5)
    packing_engine.ask(Ask(STORY, (), channels(), 20), Ask(STORY, (), both, 20))
    assert freed("think") > before[0]
    assert freed("lagkv+think") > before[1]


def test_the_worker_forgets_the_channels_of_requests_that_have_ended(
    packing_engine: Engine,
) -> None:
    asks = [Ask(a.prompt, a.images, a.pruning, 200) for a in CHANNEL_ASKS]
    for _ in range(3):
        ids = [start(packing_engine, ask) for ask in asks]
        step(packing_engine, 10)
        abort(packing_engine, ids)
        drain(packing_engine)
    runner = packing_engine.runner
    choices = runner._packer._choices.values()
    for queries, choice in zip(runner._observer._queries, choices, strict=True):
        # the last request's row is cleared when the worker hears of its end
        assert len(queries) + len(choice.kept) <= len(asks)
