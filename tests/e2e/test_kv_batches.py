"""Requests that evict share batches, blocks and the prefix cache with others, and harm none."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import Engine
from tests.e2e.test_batches import ROUNDING, count_preemptions, drain, internal_id, start
from tests.oracle.asks import COMPARE, DESCRIBE, STORY, TEXT, Answer, Ask, kv, visual
from tokenprune.errors import DivergenceError

pytestmark = pytest.mark.vllm

ASKS = [
    Ask(STORY, max_tokens=24),
    Ask(STORY, (), kv("lagkv"), 24),
    Ask(STORY, (), kv("streaming", 0.5, lag=16), 24),
    Ask(DESCRIBE, (1,), max_tokens=24),
    Ask(DESCRIBE, (1,), kv("random", seed=3) | visual("uniform", 0.25), 24),
    Ask(COMPARE, (1, 2), kv("lagkv") | visual("transprune", 0.25), 24),
    Ask(TEXT, max_tokens=24),
]


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[Answer]:
    engine.llm.reset_prefix_cache()
    answers = []
    for ask in ASKS:
        answers += engine.ask(ask)
        engine.llm.reset_prefix_cache()
    return answers


@pytest.mark.parametrize("seed", range(2))
def test_a_mixed_batch_in_any_order_equals_each_request_alone(
    engine: Engine, alone: list[Answer], seed: int
) -> None:
    order = list(range(len(ASKS)))
    random.Random(seed).shuffle(order)
    for i, answer in zip(order, engine.ask(*(ASKS[i] for i in order)), strict=True):
        assert answer.agrees_with(alone[i], ROUNDING), ASKS[i]
    assert engine.blocks_missing == 0


def test_neighbours_of_an_evicting_request_are_bit_equal(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vLLM's CPU kernel may split the keys of a row by the lengths of all rows in the batch, and sum
    # the parts; without that the neighbour's sums are the same and nothing may differ at all
    monkeypatch.setattr("vllm.envs.VLLM_CPU_ATTN_SPLIT_KV", False, raising=False)
    plain, other = Ask(DESCRIBE, (7,), max_tokens=30), Ask(TEXT, max_tokens=30)
    answers = []
    for pruning in (None, kv("lagkv"), kv("streaming")):
        engine.llm.reset_prefix_cache()
        first, _, last = engine.ask(plain, Ask(STORY, (), pruning, 30), other)
        answers.append((first, last))
    assert answers[0] == answers[1] == answers[2]


def test_unpruned_answers_do_not_change_whoever_shared_their_prefix_before(engine: Engine) -> None:
    evicting, plain = Ask(STORY, (), kv("lagkv"), 10), Ask(STORY, max_tokens=10)
    engine.llm.reset_prefix_cache()
    (expected,) = engine.ask(plain)
    (expected_evicting,) = engine.ask(evicting)
    for order in ([evicting, plain], [plain, evicting, plain], [evicting, plain, evicting]):
        engine.llm.reset_prefix_cache()
        for ask in order:
            (answer,) = engine.ask(ask)
            assert answer.agrees_with(
                expected_evicting if ask is evicting else expected, ROUNDING
            ), order


def test_evicting_requests_neither_read_nor_fill_the_prefix_cache(engine: Engine) -> None:
    def cached() -> int:
        return len(engine.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block)

    engine.llm.reset_prefix_cache()
    engine.ask(Ask(STORY, (), kv("lagkv"), 20))
    assert cached() == 0
    engine.ask(Ask(STORY, max_tokens=20))
    filled = cached()
    assert filled > 0
    engine.ask(Ask(STORY, (), kv("streaming"), 20))
    assert cached() == filled


def held_by_formula(engine: Engine, request_id: str) -> tuple[int, int]:
    """Return the blocks one request holds, and those its settled length needs."""
    request = engine.scheduler.requests[request_id]
    lengths = engine.scheduler._plans[request_id].lengths.all_stages(request.num_computed_tokens)
    groups = engine.scheduler.kv_cache_config.kv_cache_groups
    return engine.blocks_missing, sum(-(-lengths[g.kv_cache_spec.stage] // 32) for g in groups)


def test_blocks_return_to_the_pool_while_the_request_runs(engine: Engine) -> None:
    request_id = start(engine, Ask(STORY, (), kv("lagkv", 0.125, lag=32), max_tokens=120))
    held = []
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.llm.llm_engine.step()
        if not engine.scheduler.running:
            break
        missing, settled = held_by_formula(engine, internal_id(engine, request_id))
        groups = len(engine.scheduler.kv_cache_config.kv_cache_groups)
        # what the last step emptied is given back when the next one is scheduled
        assert settled <= missing
        if len(held) > 1:
            assert missing <= settled + groups
        held.append(missing)
    drain(engine)
    assert engine.blocks_missing == 0
    assert held[0] > 2 * held[1], "the prompt's blocks must come back after the first step"
    assert any(b < a for a, b in itertools.pairwise(held[2:])), "and those of generated tokens"


def test_aborting_mid_generation_returns_every_block(engine: Engine) -> None:
    ids = [start(engine, Ask(a.prompt, a.images, a.pruning, 200)) for a in ASKS]
    for step in range(20):
        engine.llm.llm_engine.step()
        if step in (0, 7, 13):
            engine.llm.llm_engine.abort_request([ids.pop(1)])
    assert engine.blocks_missing > 0
    engine.llm.llm_engine.abort_request(ids)
    drain(engine)
    assert engine.blocks_missing == 0
    assert not engine.scheduler._plans


def test_several_choices_of_one_prompt_evict_each_for_itself(engine: Engine) -> None:
    from vllm import SamplingParams

    def sampled(seed: int, n: int) -> list[list[int]]:
        params = SamplingParams(
            n=n, seed=seed, max_tokens=20, ignore_eos=True, extra_args=kv("lagkv")
        )
        (output,) = engine.llm.generate([STORY], params, use_tqdm=False)
        return [list(o.token_ids) for o in output.outputs]

    # choice i draws with seed + i
    assert sampled(5, 3) == [sampled(5 + i, 1)[0] for i in range(3)]
    assert engine.blocks_missing == 0


def test_what_the_worker_counts_is_what_was_evicted(engine: Engine) -> None:
    def figures() -> tuple[float, float, int]:
        (stats,) = engine.llm.llm_engine.collective_rpc("tokenprune_stats")
        tokens = stats["kv_tokens"].get("streaming", {"written": 0, "evicted": 0})
        return tokens["written"], tokens["evicted"], stats["kv_blocks_freed"].get("streaming", 0)

    before = figures()
    ask = Ask(STORY, (), kv("streaming", lag=16), 40)
    (answer,) = engine.ask(ask)
    written, evicted, freed = (b - a for a, b in zip(before, figures(), strict=True))
    computed = len(engine.llm.get_tokenizer().encode(STORY)) + len(answer.tokens) - 1
    assert written == computed
    assert evicted == ((computed - 4) // 16 - 1) * (16 - 4)
    assert freed > 0


def test_the_buffers_that_graphs_read_stay_where_they_are(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    runner = worker.model_runner
    state = runner.model_state
    prepare, addresses, lengths = state.prepare_attn, set(), []

    def watched(batch: Any, mode: Any, tables: Any, slots: Any, *args: Any, **kwargs: Any) -> Any:
        batches = state.step.batches if state.step else [batch] * len(state._groups)
        graphs = [state._persistent(s, b).seq_lens for s, b in enumerate(batches)]
        for graph, stage in zip(graphs, batches, strict=True):
            assert graph.tolist() == stage.seq_lens.tolist()
        addresses.add(
            (
                *(g.data_ptr() for g in graphs),
                *(t.data_ptr() for t in tables),
                *(s.data_ptr() for s in slots),
                runner._table.index_offset_on_device.data_ptr(),
            )
        )
        lengths.append(int(graphs[0][0]))
        return prepare(batch, mode, tables, slots, *args, **kwargs)

    monkeypatch.setattr(state, "prepare_attn", watched)
    engine.ask(Ask(STORY, (), kv("lagkv"), 40), Ask(TEXT, max_tokens=9))
    assert len(addresses) == 1
    assert any(b < a - 1 for a, b in itertools.pairwise(lengths)), "nothing was evicted"


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
    )
    yield engine
    engine.close()


def test_an_engine_without_stages_evicts_in_one_group(cramped: Engine) -> None:
    assert len(cramped.scheduler.kv_cache_config.kv_cache_groups) == 1
    assert cramped.scheduler._shape.boundaries == (0,)


def test_preempted_requests_end_at_the_same_lengths(cramped: Engine) -> None:
    half = STORY[: len(STORY) // 2]
    asks = [
        Ask(half, (), pruning, max_tokens=100)
        for pruning in (None, kv("lagkv", 0.5, lag=32), kv("streaming", 0.5, lag=32))
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
    kv("lagkv"),
    kv("lagkv", 0.5, when="chunk"),
    kv("lagkv", lag=40),
    kv("streaming", 0.5, lag=16, when="chunk"),
    kv("random", seed=2, lag=16),
    kv("lagkv", 1.0),
]


def random_traffic(engine: Engine, count: int, seed: int) -> int:
    """Send `count` random requests, aborting some; return how often one was preempted."""
    rng = random.Random(seed)
    words = STORY.split()
    live: list[str] = []
    preempted = count_preemptions(engine)
    for _ in range(count):
        prompt = " ".join(words[: rng.randint(1, len(words))])
        live.append(start(engine, Ask(prompt, (), rng.choice(CHOICES), rng.randint(1, 40))))
        for _ in range(rng.randint(0, 4)):
            engine.llm.llm_engine.step()
        if rng.random() < 0.2:
            engine.llm.llm_engine.abort_request([live.pop(rng.randrange(len(live)))])
        if len(live) > 40:
            drain(engine)
            live.clear()
    drain(engine)
    return preempted()


def test_two_thousand_random_requests_leave_no_block_behind(cramped: Engine) -> None:
    assert random_traffic(cramped, 2000, seed=1) > 0
    assert cramped.blocks_missing == 0
    assert not cramped.scheduler._plans


def test_a_scheduler_that_forgets_to_free_stops_the_engine(checkpoint: Path) -> None:
    engine = Engine(checkpoint, prune_layers=[])
    try:
        request_id = start(engine, Ask(STORY, (), kv("lagkv"), max_tokens=20))
        for manager in engine.scheduler._managers:
            manager.free_evicted = lambda *_: None
        # the prompt, which evicts
        engine.llm.llm_engine.step()
        with pytest.raises(DivergenceError, match=request_id):
            engine.llm.llm_engine.step()
    finally:
        engine.close()
