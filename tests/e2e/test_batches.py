"""Pruned, unpruned and text requests share batches, blocks and the prefix cache unharmed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import Engine
from tests.oracle.asks import COMPARE, DESCRIBE, TEXT, Answer, Ask, image, visual
from tokenprune.errors import DivergenceError

pytestmark = pytest.mark.vllm

# summation order in a matrix product depends on the number of rows in the batch, also in stock
# vLLM on a CPU; this bound is far below what one wrong row does
ROUNDING = 2e-5

ASKS = [
    Ask(DESCRIBE, (1,)),
    Ask(DESCRIBE, (1,), visual("transprune", 0.125)),
    Ask(DESCRIBE, (1,), visual("uniform", 0.25)),
    Ask(TEXT),
    Ask(DESCRIBE, (2,), visual("random", 0.5, seed=3)),
    Ask(COMPARE, (1, 2), visual("transprune", 0.25)),
    Ask(COMPARE, (1, 2)),
    Ask(COMPARE, (2, 1), visual("vflowopt", 0.25, threshold=1.5)),
    Ask(DESCRIBE, (2,)),
]


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[Answer]:
    engine.llm.reset_prefix_cache()
    answers = []
    for ask in ASKS:
        answers += engine.ask(ask)
        engine.llm.reset_prefix_cache()
    return answers


@pytest.mark.parametrize("seed", range(4))
def test_a_mixed_batch_in_any_order_equals_each_request_alone(
    engine: Engine, alone: list[Answer], seed: int
) -> None:
    order = list(range(len(ASKS)))
    random.Random(seed).shuffle(order)
    for i, answer in zip(order, engine.ask(*(ASKS[i] for i in order)), strict=True):
        assert answer.agrees_with(alone[i], ROUNDING), ASKS[i]
    assert engine.blocks_missing == 0


@pytest.mark.parametrize("seed", range(3))
def test_one_after_the_other_with_a_warm_prefix_cache_equals_each_alone(
    engine: Engine, alone: list[Answer], seed: int
) -> None:
    order = list(range(len(ASKS)))
    random.Random(100 + seed).shuffle(order)
    for i in order:
        (answer,) = engine.ask(ASKS[i])
        assert answer.agrees_with(alone[i], ROUNDING), ASKS[i]


def test_pruned_requests_neither_read_nor_fill_the_prefix_cache(engine: Engine) -> None:
    def cached() -> int:
        return len(engine.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block)

    engine.llm.reset_prefix_cache()
    engine.ask(Ask(DESCRIBE, (9,), visual("uniform")))
    assert cached() == 0
    engine.ask(Ask(DESCRIBE, (9,)))
    filled = cached()
    assert filled > 0
    engine.ask(Ask(DESCRIBE, (9,), visual("transprune")))
    assert cached() == filled


def test_a_pruned_request_holds_the_blocks_of_its_physical_length(engine: Engine) -> None:
    held = {}
    for name, pruning in {"off": None, "pruned": visual("transprune", 0.125)}.items():
        request_id = start(engine, Ask(COMPARE, (3, 4), pruning, max_tokens=64))
        for _ in range(3):
            engine.llm.llm_engine.step()
        held[name] = engine.blocks_missing
        plan = engine.scheduler._plans.get(internal_id(engine, request_id))
        if plan is not None:
            computed = engine.scheduler.requests[internal_id(engine, request_id)]
            lengths = plan.lengths.all_stages(computed.num_computed_tokens)
            groups = engine.scheduler.kv_cache_config.kv_cache_groups
            blocks = [-(-lengths[g.kv_cache_spec.stage] // 32) for g in groups]
            assert held[name] == sum(blocks)
        engine.llm.llm_engine.abort_request([request_id])
        drain(engine)
    assert held["pruned"] < 0.7 * held["off"]


def test_aborting_mid_generation_returns_every_block(engine: Engine) -> None:
    ids = [start(engine, Ask(a.prompt, a.images, a.pruning, max_tokens=200)) for a in ASKS]
    for step in range(12):
        engine.llm.llm_engine.step()
        if step in (0, 3, 7):
            engine.llm.llm_engine.abort_request([ids.pop()])
    assert engine.blocks_missing > 0
    engine.llm.llm_engine.abort_request(ids)
    drain(engine)
    assert engine.blocks_missing == 0
    assert not engine.scheduler._plans


@pytest.fixture(scope="module")
def cramped(checkpoint: Path) -> Iterator[Engine]:
    """An engine that must cut prompts into chunks and preempt."""
    engine = Engine(
        checkpoint,
        max_num_batched_tokens=192,
        max_model_len=512,
        num_gpu_blocks_override=140,
        max_num_seqs=6,
    )
    yield engine
    engine.close()


@pytest.mark.parametrize("method", ["uniform", "random"])
@pytest.mark.parametrize("layers", [None, [0, 3]], ids=["published", "before-layer-0"])
def test_chunked_prefill_equals_prefill_in_one_step(
    engine: Engine, cramped: Engine, method: str, layers: list[int] | None
) -> None:
    extra: dict[str, Any] = {"prune_layers": layers} if layers else {}
    ask = Ask(COMPARE, (5, 6), visual(method, 0.05, **extra))
    (whole,) = engine.ask(ask)
    (chunked,) = cramped.ask(ask)
    assert chunked.agrees_with(whole, ROUNDING)
    assert cramped.blocks_missing == 0


def test_preempted_requests_end_as_if_they_had_run_alone(cramped: Engine) -> None:
    asks = [
        Ask(DESCRIBE, (seed,), pruning, max_tokens=150)
        for seed in (1, 2)
        for pruning in (visual("transprune", 0.25), None, visual("uniform", 0.5))
    ]
    alone = [cramped.ask(ask)[0] for ask in asks]
    preempted = count_preemptions(cramped)
    together = cramped.ask(*asks)
    assert preempted(), "the pool must be too small for all of them"
    for ask, expected, answer in zip(asks, alone, together, strict=True):
        assert answer.agrees_with(expected, 1e-3), ask
    assert cramped.blocks_missing == 0


def test_hundreds_of_random_requests_leave_no_block_behind(cramped: Engine) -> None:
    rng = random.Random(0)
    choices = [
        None,
        visual("uniform", 0.3),
        visual("random", 0.1, seed=2),
        visual("transprune", 0.25),
        visual("uniform", 0.2, prune_layers=[0, 5]),
        visual("vflowopt", 0.3, threshold=1.5),
    ]
    live: list[str] = []
    for _ in range(300):
        images = (rng.randrange(4),) if rng.random() < 0.7 else ()
        prompt = DESCRIBE if images else TEXT
        live.append(start(cramped, Ask(prompt, images, rng.choice(choices), rng.randint(1, 12))))
        for _ in range(rng.randint(0, 2)):
            cramped.llm.llm_engine.step()
        if rng.random() < 0.15:
            cramped.llm.llm_engine.abort_request([live.pop(rng.randrange(len(live)))])
    drain(cramped)
    assert cramped.blocks_missing == 0
    assert not cramped.scheduler._plans


_count = iter(range(10**9))


def start(engine: Engine, ask: Ask) -> str:
    from vllm import SamplingParams

    request_id = f"r{next(_count)}"
    data = {"multi_modal_data": {"image": [image(s) for s in ask.images]}} if ask.images else {}
    engine.llm.llm_engine.add_request(
        request_id,
        {"prompt": ask.prompt, **data},
        SamplingParams(
            temperature=0, max_tokens=ask.max_tokens, ignore_eos=True, extra_args=ask.pruning
        ),
    )
    return request_id


def internal_id(engine: Engine, request_id: str) -> str:
    return next(r for r in engine.scheduler.requests if r.startswith(request_id))


def drain(engine: Engine) -> None:
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.llm.llm_engine.step()
    engine.llm.llm_engine.step()


def count_preemptions(engine: Engine) -> Any:
    scheduler, seen = engine.scheduler, []
    preempt = scheduler._preempt_request

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counted
    return lambda: len(seen)


def test_a_scheduler_that_counts_otherwise_stops_the_engine_before_it_writes(
    checkpoint: Path,
) -> None:
    engine = Engine(checkpoint)
    try:
        request_id = internal_id(engine, start(engine, Ask(DESCRIBE, (1,), visual("uniform"))))
        plans = engine.scheduler._plans
        dropped = plans[request_id].lengths.dropped
        wrong = replace(plans[request_id].lengths, dropped=(dropped[0], *dropped[:-1]))
        plans[request_id] = replace(plans[request_id], lengths=wrong)
        with pytest.raises(DivergenceError, match=request_id):
            engine.llm.llm_engine.step()
    finally:
        engine.close()
