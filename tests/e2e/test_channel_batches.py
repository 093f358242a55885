"""Requests with packed channels share batches, blocks and the prefix cache, and harm none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import Engine
from tests.e2e.test_batches import ROUNDING, count_preemptions, drain, internal_id, start
from tests.oracle.asks import COMPARE, DESCRIBE, STORY, TEXT, Answer, Ask, channels, kv, visual

pytestmark = pytest.mark.vllm

# the shared checkpoint has heads of 32 channels, so half of the keys' are 16
ASKS = [
    Ask(STORY, max_tokens=40),
    Ask(STORY, (), channels(), 40),
    Ask(STORY, (), channels(values_keep_ratio=0.5) | kv("lagkv", 0.5), 40),
    Ask(DESCRIBE, (1,), max_tokens=40),
    Ask(DESCRIBE, (1,), channels(recent=20), 40),
    Ask(COMPARE, (1, 2), channels() | visual("transprune", 0.5) | kv("lagkv", 0.5), 40),
    Ask(TEXT, max_tokens=40),
]


@pytest.fixture(scope="module")
def thin(checkpoint: Path) -> Iterator[Engine]:
    engine = Engine(checkpoint, allow_channel_pruning=True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def alone(thin: Engine) -> list[Answer]:
    answers = []
    for ask in ASKS:
        thin.llm.reset_prefix_cache()
        answers += thin.ask(ask)
    thin.llm.reset_prefix_cache()
    return answers


@pytest.mark.parametrize("seed", range(2))
def test_a_mixed_batch_in_any_order_equals_each_request_alone(
    thin: Engine, alone: list[Answer], seed: int
) -> None:
    order = list(range(len(ASKS)))
    random.Random(seed).shuffle(order)
    for i, answer in zip(order, thin.ask(*(ASKS[i] for i in order)), strict=True):
        assert answer.agrees_with(alone[i], ROUNDING), ASKS[i]
    assert thin.blocks_missing == 0


def test_neighbours_of_a_packing_request_are_bit_equal(
    thin: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vLLM's CPU kernel splits the keys of a row by the lengths of all rows in the batch, and sums
    # the parts; without that the neighbour's sums are the same and nothing may differ at all
    monkeypatch.setattr("vllm.envs.VLLM_CPU_ATTN_SPLIT_KV", False, raising=False)
    plain, other = Ask(DESCRIBE, (7,), max_tokens=30), Ask(TEXT, max_tokens=30)
    answers = []
    for pruning in (None, channels(), channels(values_keep_ratio=0.5)):
        thin.llm.reset_prefix_cache()
        first, _, last = thin.ask(plain, Ask(STORY, (), pruning, 30), other)
        answers.append((first, last))
    assert answers[0] == answers[1] == answers[2]


def test_packing_requests_neither_read_nor_fill_the_prefix_cache(thin: Engine) -> None:
    def cached() -> int:
        return len(thin.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block)

    packing, plain = Ask(STORY, (), channels(), 10), Ask(STORY, max_tokens=10)
    thin.llm.reset_prefix_cache()
    (expected_packing,) = thin.ask(packing)
    assert cached() == 0
    (expected,) = thin.ask(plain)
    filled = cached()
    assert filled > 0
    for ask in (packing, plain, packing, plain):
        (answer,) = thin.ask(ask)
        assert answer.agrees_with(expected_packing if ask is packing else expected, ROUNDING)
    assert cached() == filled


def held_while_running(engine: Engine, ask: Ask) -> list[int]:
    """Return the blocks not in the pool after each step of one request."""
    request_id = start(engine, ask)
    held = []
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.llm.llm_engine.step()
        if engine.scheduler.running:
            held.append(engine.blocks_missing)
            request = engine.scheduler.requests[internal_id(engine, request_id)]
            assert request.num_computed_tokens > 0
    drain(engine)
    assert engine.blocks_missing == 0
    return held


LONG = "USER: " + " ".join(f"On day {i} it was {i % 7}." for i in range(90)) + "\nASSISTANT:"


def test_at_half_the_key_channels_a_long_prompt_holds_a_fifth_fewer_blocks(thin: Engine) -> None:
    ask = Ask(LONG, max_tokens=100)
    thin.llm.reset_prefix_cache()
    stock = held_while_running(thin, ask)
    pruned = held_while_running(thin, Ask(LONG, (), channels(window=32, recent=32), 100))
    assert len(stock) == len(pruned)
    assert pruned[0] == stock[0], "the prompt is held whole once"
    # from the step after the prompt on, also while generated tokens age
    for before, after in zip(stock[2:], pruned[2:], strict=True):
        assert after <= 0.8 * before
    print(f"blocks at the end: {stock[-1]} stock, {pruned[-1]} pruned")


def test_the_worker_reports_the_bytes_of_blocks_it_does_without(thin: Engine) -> None:
    def saved() -> int:
        (stats,) = thin.llm.llm_engine.collective_rpc("tokenprune_stats")
        return stats["kv_bytes_saved"]

    thin.llm.reset_prefix_cache()
    stock = held_while_running(thin, Ask(LONG, max_tokens=8))[-1]
    request_id = start(thin, Ask(LONG, (), channels(), max_tokens=8))
    for _ in range(7):
        thin.llm.llm_engine.step()
    groups = thin.scheduler.kv_cache_config.kv_cache_groups
    page = groups[0].kv_cache_spec.page_size_bytes * len(groups[0].layer_names)
    assert saved() == (stock - thin.blocks_missing) * page > 0
    thin.llm.llm_engine.abort_request([request_id])
    drain(thin)
    assert saved() == 0
    assert thin.blocks_missing == 0


def test_blocks_freed_are_counted_by_method(thin: Engine) -> None:
    def freed(method: str) -> int:
        (stats,) = thin.llm.llm_engine.collective_rpc("tokenprune_stats")
        return int(stats["kv_blocks_freed"].get(method, 0))

    before = freed("think"), freed("lagkv+think")
    thin.ask(Ask(STORY, (), channels(), 20), Ask(STORY, (), channels() | kv("lagkv", 0.5), 20))
    assert freed("think") > before[0]
    assert freed("lagkv+think") > before[1]


def test_aborting_mid_generation_returns_every_block(thin: Engine) -> None:
    ids = [start(thin, Ask(a.prompt, a.images, a.pruning, 200)) for a in ASKS]
    for step in range(20):
        thin.llm.llm_engine.step()
        if step in (0, 7, 13):
            thin.llm.llm_engine.abort_request([ids.pop(1)])
    assert thin.blocks_missing > 0
    thin.llm.llm_engine.abort_request(ids)
    drain(thin)
    assert thin.blocks_missing == 0
    assert not thin.scheduler._plans
    pruner = thin.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    runner = pruner.model_runner
    choices = runner._packer._choices.values()
    for queries, choice in zip(runner._observer._queries, choices, strict=True):
        # the last request's row is cleared when the worker hears of its end
        assert len(queries) + len(choice.kept) <= len(ASKS)


def test_what_full_graphs_read_says_the_same_at_the_same_place(
    thin: Engine, alone: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = thin.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    runner = worker.model_runner
    pruner, prepare, addresses, packed = runner._packer, runner.prepare_attn, set(), []

    def persistent(batch: Any) -> Any:
        tables = prepare(batch)
        if batch.num_tokens == batch.num_reqs:
            # a step that a full graph could replay; the CPU has none, so the buffer is all there is
            fresh = [None if rows is None else rows.clone() for rows in pruner._rows]
            pruner.persist(batch.num_reqs)
            for rows, kept in zip(fresh, pruner._rows, strict=True):
                used = kept[kept[:, 0] >= 0]
                assert used.tolist() == ([] if rows is None else rows.tolist())
                packed.append(len(used))
                addresses.add(kept.data_ptr())
        return tables

    monkeypatch.setattr(runner, "prepare_attn", persistent)
    for answer, expected in zip(thin.ask(*ASKS), alone, strict=True):
        assert answer.agrees_with(expected, ROUNDING)
    assert len(addresses) == len(pruner._rows)
    assert max(packed) >= 3


# an engine that must cut prompts into chunks and preempt


@pytest.fixture(scope="module")
def cramped(checkpoint: Path) -> Iterator[Engine]:
    engine = Engine(
        checkpoint,
        prune_layers=[],
        max_num_batched_tokens=192,
        max_model_len=512,
        num_gpu_blocks_override=20,
        max_num_seqs=6,
        allow_channel_pruning=True,
    )
    yield engine
    engine.close()


def test_preempted_requests_end_at_the_same_lengths(cramped: Engine) -> None:
    asks = [
        Ask(STORY, (), pruning, max_tokens=100)
        for pruning in (None, channels(), channels() | kv("lagkv", 0.5, lag=32))
    ] * 2
    preempted = count_preemptions(cramped)
    answers = cramped.ask(*asks)
    assert preempted(), "the pool must be too small for all of them"
    assert [len(a.tokens) for a in answers] == [100] * 6
    # a plain request is not touched by whoever was preempted around it
    (alone,) = cramped.ask(asks[0])
    assert answers[0].agrees_with(alone, 1e-3)
    assert cramped.blocks_missing == 0
    assert not cramped.scheduler._plans


CHOICES = [
    None,
    channels(),
    channels(recent=0, window=1, values_keep_ratio=0.5),
    channels(pack_generated=False),
    channels() | kv("lagkv"),
    channels(recent=30) | kv("lagkv", 0.5, when="chunk"),
    channels() | kv("random", seed=2, lag=16),
    channels() | kv("streaming"),
]


def test_random_requests_leave_no_block_behind(cramped: Engine) -> None:
    rng = random.Random(0)
    words = STORY.split()
    live: list[str] = []
    preempted = count_preemptions(cramped)
    for _ in range(60):
        prompt = " ".join(words[: rng.randint(1, len(words))])
        live.append(start(cramped, Ask(prompt, (), rng.choice(CHOICES), rng.randint(1, 90))))
        for _ in range(rng.randint(0, 3)):
            cramped.llm.llm_engine.step()
        if rng.random() < 0.2:
            cramped.llm.llm_engine.abort_request([live.pop(rng.randrange(len(live)))])
    drain(cramped)
    assert preempted() > 0
    assert cramped.blocks_missing == 0
    assert not cramped.scheduler._plans
