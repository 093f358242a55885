"""Pruned requests read what others left in the prefix cache, and leave what others can read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.e2e.support import ROUNDING, Engine, abort, drain, internal_id, start, step
from tests.oracle.asks import DESCRIBE, Answer, Ask, channels, kv, vflowopt, visual

pytestmark = pytest.mark.vllm

DAYS = " ".join(f"On day {i} it was {i % 7}." for i in range(40))
PROMPT = f"USER: {DAYS}\nASSISTANT:"
LONGER = f"USER: {DAYS}\nASSISTANT: It was so.\nUSER: And then?\nASSISTANT:"
SYSTEM = f"SYSTEM: {DAYS}\n"
BLOCK = 32
EVICTING = {
    f"{method}-{when}": kv(method, lag=32, when=when)
    for method in ("lagkv", "streaming", "random")
    for when in ("prompt_end", "chunk")
}
# tokens of the first cut, less one, in whole blocks
BEFORE_A_CUT = (4 + 2 * 32 - 1) // BLOCK * BLOCK

every_method = pytest.mark.parametrize("name", EVICTING)


def num_tokens(engine: Engine, prompt: str) -> int:
    return len(engine.llm.get_tokenizer().encode(prompt))


def longest_hit(engine: Engine, prompt: str, name: str) -> int:
    """Return what a cache of everything should bring to a request."""
    whole = (num_tokens(engine, prompt) - 1) // BLOCK * BLOCK
    return BEFORE_A_CUT if name.endswith("chunk") else whole


def ask_cold(engine: Engine, ask: Ask) -> Answer:
    engine.llm.reset_prefix_cache()
    (answer,) = engine.ask(ask)
    assert engine.hits == [0]
    return answer


@every_method
def test_an_answer_is_the_same_whoever_computed_its_prefix(engine: Engine, name: str) -> None:
    pruned, other = Ask(PROMPT, (), EVICTING[name], 40), Ask(PROMPT, (), kv("random", seed=9), 9)
    cold = ask_cold(engine, pruned)
    hit = longest_hit(engine, PROMPT, name)
    for first in (pruned, replace(pruned, pruning=None), other):
        ask_cold(engine, first)
        (warm,) = engine.ask(pruned)
        assert engine.hits == [hit]
        assert warm.agrees_with(cold, ROUNDING), first
    # the next turn begins with the whole of this one
    longer = replace(pruned, prompt=LONGER)
    expected = ask_cold(engine, longer)
    ask_cold(engine, pruned)
    (found,) = engine.ask(longer)
    shared = num_tokens(engine, PROMPT) // BLOCK * BLOCK
    assert engine.hits == [min(shared, longest_hit(engine, LONGER, name))]
    assert found.agrees_with(expected, ROUNDING)
    assert engine.is_idle


@pytest.mark.parametrize("name", [*EVICTING, "think"])
def test_an_unpruned_request_reads_the_same_bits_from_one_that_gives_up_kv(
    packing_engine: Engine, name: str
) -> None:
    engine = packing_engine
    plain = Ask(PROMPT, max_tokens=20)
    pruned = replace(plain, pruning=channels() if name == "think" else EVICTING[name])
    answers = []
    for first in (plain, pruned):
        ask_cold(engine, first)
        answers += engine.ask(plain)
        assert engine.hits == [longest_hit(engine, PROMPT, "prompt_end")]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "pruning",
    [
        channels(),
        channels(values_keep_ratio=0.5) | kv("lagkv", 0.5, lag=32),
        channels() | kv("lagkv", 0.5, when="chunk"),
    ],
    ids=["think", "with-lagkv", "with-lagkv-in-chunks"],
)
def test_packed_blocks_are_never_those_that_others_read(
    packing_engine: Engine, pruning: dict[str, Any]
) -> None:
    engine = packing_engine
    ask = Ask(PROMPT, (), pruning, 40)
    cold = ask_cold(engine, ask)
    for first in (ask, replace(ask, pruning=None)):
        ask_cold(engine, first)
        for _ in range(2):
            (warm,) = engine.ask(ask)
            assert engine.hits[0] > 0
            assert engine.hits[0] <= num_tokens(engine, PROMPT) - 8, "the window is computed"
            assert warm.agrees_with(cold, ROUNDING)


def test_a_batch_that_shares_a_prefix_equals_each_alone(engine: Engine) -> None:
    prunings = [None, *EVICTING.values(), None]
    asks = [Ask(PROMPT, (), pruning, 30) for pruning in prunings]
    alone = [ask_cold(engine, ask) for ask in asks]
    for cold in (True, False):
        if cold:
            engine.llm.reset_prefix_cache()
        for answer, expected in zip(engine.ask(*asks), alone, strict=True):
            assert answer.agrees_with(expected, ROUNDING)
    assert min(engine.hits) > 0
    assert engine.is_idle


def test_a_row_lies_in_the_blocks_that_the_scheduler_counts(engine: Engine) -> None:
    def blocks(side: str) -> list[list[int]]:
        rows = []
        for group, manager in enumerate(engine.scheduler._managers):
            if side == "scheduler":
                rows.append([b.block_id for b in manager.req_to_blocks[name]])
                continue
            tables, row = engine.runner.block_tables, engine.runner.req_states.req_id_to_index[name]
            count = int(tables.num_blocks.np[group, row])
            rows.append(tables.block_tables[group].gpu[row, :count].tolist())
        return rows

    ask_cold(engine, Ask(PROMPT, max_tokens=1))
    request_id = start(engine, Ask(PROMPT, (), kv("lagkv", 0.5, lag=32), 60))
    name = internal_id(engine, request_id)
    step(engine)
    raw = blocks("scheduler")
    moved = [[b.block_id for b in m.moved_rows[name]] for m in engine.scheduler._managers]
    assert all(a[0] != b[0] and len(a) < len(b) for a, b in zip(moved, raw, strict=True))
    for _ in range(50):
        step(engine)
        assert blocks("worker") == blocks("scheduler")
    assert [row[0] for row in blocks("worker")] == [target[0] for target in moved]
    abort(engine, [request_id])
    drain(engine)


def test_a_short_prompt_is_cut_while_it_is_answered(engine: Engine) -> None:
    prompt = f"USER: {DAYS[:130]}\nASSISTANT:"
    tokens = num_tokens(engine, prompt)
    pruning = kv("lagkv", lag=48)
    assert BLOCK < tokens < 4 + 2 * 48
    ask = Ask(prompt, (), pruning, 90)
    cold = ask_cold(engine, ask)
    filled = engine.num_cached // len(engine.groups)
    # generated tokens are left to others too, up to the cut
    assert filled == (4 + 2 * 48) // BLOCK
    (warm,) = engine.ask(ask)
    assert engine.hits == [(tokens - 1) // BLOCK * BLOCK]
    assert warm.agrees_with(cold, ROUNDING)


def test_a_chat_that_never_evicts_keeps_the_prefix_cache(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    hits, look_up = list[int](), engine.scheduler._get_local_prefix_cache_hit

    def recorded(request: Any) -> Any:
        hit = look_up(request)
        hits.append(hit[1])
        return hit

    monkeypatch.setattr(engine.scheduler, "_get_local_prefix_cache_hit", recorded)
    engine.llm.reset_prefix_cache()
    for prompt in (PROMPT, LONGER):
        # a context of 1040 tokens may come, and does not
        request_id = start(engine, Ask(prompt, (), kv("lagkv", sink=16, lag=512), 1000))
        assert internal_id(engine, request_id) in engine.scheduler._plans
        step(engine, 5)
        abort(engine, [request_id])
        drain(engine)
    assert hits == [0, num_tokens(engine, PROMPT) // BLOCK * BLOCK]


@pytest.mark.parametrize("evicting", [{}, kv("lagkv", 0.5, lag=32)], ids=["alone", "lagkv"])
@pytest.mark.parametrize(
    "pruning",
    [
        visual("uniform"),
        visual("random", seed=3),
        vflowopt(0.3, threshold=1.5),
        visual("transprune"),
        visual("transprune", 0.2, prune_layers=[0, 5], form="paper"),
    ],
    ids=["uniform", "random", "vflowopt", "transprune", "transprune-before-layer-0"],
)
def test_text_before_the_first_image_is_computed_once_for_everybody(
    engine: Engine, pruning: dict[str, Any], evicting: dict[str, Any]
) -> None:
    ask = Ask(SYSTEM + DESCRIBE, (4,), pruning | evicting, 20)
    plain = replace(ask, pruning=None)
    text = num_tokens(engine, (SYSTEM + DESCRIBE).partition("<image>")[0])
    hit = text // BLOCK * BLOCK
    cold, cold_plain = ask_cold(engine, ask), ask_cold(engine, plain)
    for first in (Ask(SYSTEM, max_tokens=1), plain, replace(ask, images=(5,))):
        ask_cold(engine, first)
        (warm,) = engine.ask(ask)
        assert engine.hits == [hit], first
        assert warm.agrees_with(cold, ROUNDING), first
    ask_cold(engine, ask)
    (warm,) = engine.ask(plain)
    assert engine.hits == [hit]
    assert warm.agrees_with(cold_plain, ROUNDING)
