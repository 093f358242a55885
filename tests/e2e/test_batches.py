"""Pruned and unpruned requests share batches, blocks and the prefix cache, and harm none.

The contract of every axis; `contract.py` says what each sends.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.contract import AXES, CHANNELS, KV, VISUAL, Axis, send_at_random
from tests.e2e.support import ROUNDING, Engine, abort, drain, preemptions, start, step
from tests.oracle.asks import COMPARE, DESCRIBE, STORY, TEXT, Answer, Ask, kv, visual

pytestmark = pytest.mark.vllm

every_axis = pytest.mark.parametrize("axis", AXES, ids=str)
every_order = pytest.mark.parametrize(
    ("axis", "seed"),
    [pytest.param(a, seed, id=f"{a}-{seed}") for a in AXES for seed in range(a.num_orders)],
)
every_crowd = pytest.mark.parametrize(
    ("axis", "crowd"),
    [pytest.param(a, crowd, id=crowd) for a in AXES for crowd in a.crowds],
)


@pytest.fixture
def engine(axis: Axis, lend: Callable[..., Engine]) -> Engine:
    return lend(**axis.engine)


@pytest.fixture
def cramped(axis: Axis, lend: Callable[..., Engine]) -> Engine:
    return lend(**axis.cramped)


@pytest.fixture(scope="module")
def answered() -> dict[str, list[Answer]]:
    return {}


@pytest.fixture
def alone(axis: Axis, engine: Engine, answered: dict[str, list[Answer]]) -> list[Answer]:
    """The answers to an axis' requests, each in an engine without other requests before it."""
    if axis.name not in answered:
        answers = []
        for ask in axis.asks:
            engine.llm.reset_prefix_cache()
            answers += engine.ask(ask)
        engine.llm.reset_prefix_cache()
        answered[axis.name] = answers
    return answered[axis.name]


def shuffled(asks: list[Ask], seed: int) -> list[int]:
    return random.Random(seed).sample(range(len(asks)), len(asks))


@every_order
def test_a_mixed_batch_in_any_order_equals_each_request_alone(
    engine: Engine, axis: Axis, alone: list[Answer], seed: int
) -> None:
    order = shuffled(axis.asks, seed)
    for i, answer in zip(order, engine.ask(*(axis.asks[i] for i in order)), strict=True):
        assert answer.agrees_with(alone[i], ROUNDING), axis.asks[i]
    assert engine.is_idle


@pytest.mark.proves("prefix cache")
@every_order
def test_one_after_the_other_with_a_warm_prefix_cache_equals_each_alone(
    engine: Engine, axis: Axis, alone: list[Answer], seed: int
) -> None:
    for i in shuffled(axis.asks, 100 + seed):
        (answer,) = engine.ask(axis.asks[i])
        assert answer.agrees_with(alone[i], ROUNDING), axis.asks[i]


# pruning visual tokens changes the rows of the prompt's step, and so the sums of all its rows
@pytest.mark.parametrize("axis", [KV, CHANNELS], ids=str)
def test_neighbours_of_a_request_that_gives_up_kv_are_bit_equal(
    engine: Engine, axis: Axis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vLLM's CPU kernel may split the keys of a row by the lengths of all rows in the batch, and sum
    # the parts; without that the neighbour's sums are the same and nothing may differ at all
    monkeypatch.setattr("vllm.envs.VLLM_CPU_ATTN_SPLIT_KV", False, raising=False)
    plain, other = Ask(DESCRIBE, (7,), max_tokens=30), Ask(TEXT, max_tokens=30)
    answers = []
    for pruning in (None, *axis.prunings):
        engine.llm.reset_prefix_cache()
        first, _, last = engine.ask(plain, Ask(*axis.prompt, pruning, 30), other)
        answers.append((first, last))
    assert answers[0] == answers[1] == answers[2]


@every_axis
def test_pruned_requests_read_and_fill_the_prefix_cache_as_far_as_they_are_whole(
    engine: Engine, axis: Axis
) -> None:
    first, second, plain = (Ask(*axis.prompt, p, 20) for p in (*axis.prunings, None))
    filled = []
    for ask in (plain, first):
        engine.llm.reset_prefix_cache()
        engine.ask(ask)
        filled.append(engine.num_cached)
    engine.ask(second)
    if axis.prompt[1]:
        assert filled[1] == 0, "nothing is in front of the picture"
        assert engine.hits == [0]
    else:
        # of generated tokens an unpruned request leaves a block more
        assert 0 < filled[1] <= filled[0]
        assert engine.hits[0] > 0


@every_axis
def test_answers_do_not_change_whoever_shared_their_prefix_before(
    engine: Engine, axis: Axis
) -> None:
    pruned, plain = Ask(*axis.prompt, axis.prunings[0], 10), Ask(*axis.prompt, None, 10)
    engine.llm.reset_prefix_cache()
    (expected,) = engine.ask(plain)
    (expected_pruned,) = engine.ask(pruned)
    for order in ([pruned, plain], [plain, pruned, plain], [pruned, plain, pruned]):
        engine.llm.reset_prefix_cache()
        for ask in order:
            (answer,) = engine.ask(ask)
            wanted = expected_pruned if ask is pruned else expected
            assert answer.agrees_with(wanted, ROUNDING), order


@every_axis
def test_aborting_mid_generation_returns_every_block(engine: Engine, axis: Axis) -> None:
    ids = [start(engine, Ask(a.prompt, a.images, a.pruning, 200)) for a in axis.asks]
    for number in range(20):
        step(engine)
        if number in (0, 7, 13):
            abort(engine, [ids.pop(1), ids.pop()])
    assert engine.blocks_missing > 0
    abort(engine, ids)
    drain(engine)
    assert engine.is_idle


@pytest.mark.proves(
    "preemption", "transprune", "visual/uniform", "vflowopt", "lagkv", "streaming", "think"
)
@every_crowd
def test_preempted_requests_end_as_if_they_had_run_alone(
    cramped: Engine, axis: Axis, crowd: str
) -> None:
    asks = axis.crowds[crowd]
    with preemptions(cramped) as preempted:
        answers = cramped.ask(*asks)
    assert any(preempted), "the pool must be too small for all of them, and a pruned one give way"
    assert [len(answer.tokens) for answer in answers] == [ask.max_tokens for ask in asks]
    alone: dict[int, Answer] = {}
    for ask, answer in zip(asks, answers, strict=True):
        if axis.repeats_itself or ask.pruning is None:
            first = asks.index(ask)
            if first not in alone:
                (alone[first],) = cramped.ask(ask)
            assert answer.agrees_with(alone[first], 1e-3), ask
    assert cramped.is_idle


@every_axis
def test_random_requests_leave_no_block_behind(cramped: Engine, axis: Axis) -> None:
    preempted = send_at_random(cramped, axis)
    assert preempted > 0 or not axis.traffic.must_preempt
    assert cramped.is_idle


@pytest.mark.proves("chunked prefill", "visual/uniform", "visual/random")
@pytest.mark.parametrize("axis", [VISUAL], ids=str)
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


@pytest.mark.proves("n", "lagkv")
@pytest.mark.parametrize("axis", [KV], ids=str)
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


@pytest.mark.parametrize("axis", [KV], ids=str)
def test_an_engine_without_stages_evicts_in_one_group(cramped: Engine) -> None:
    assert len(cramped.groups) == 1
    assert cramped.scheduler._shape.boundaries == (0,)
