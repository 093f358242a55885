"""Which prompts may begin, and how many may end in one step, where rows wait for them."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from tokenprune.engine.waiting_budget import WaitingBudget

ROOM, STEP = 700, 512


def request(name, rows, prompt, computed=0):
    return SimpleNamespace(
        request_id=name, rows=rows, num_prompt_tokens=prompt, num_computed_tokens=computed
    )


def budget(*requests):
    plans = {
        r.request_id: SimpleNamespace(waiting_rows=lambda n, rows=r.rows: min(n, rows))
        for r in requests
        if r.rows
    }
    return WaitingBudget(plans, ROOM, STEP)


def test_a_prompt_takes_room_for_all_of_it_until_it_is_complete():
    half, long, short = request("half", 544, 544, 40), request("b", 544, 544), request("c", 90, 90)
    plain = request("plain", 0, 544)
    running = [half, plain]
    assert budget(half, short).admits(short, running)
    assert not budget(half, long).admits(long, running)
    # a request that waits for nothing needs none
    assert budget(half, long).admits(plain, running)
    half.num_computed_tokens = 544
    assert budget(half, long).admits(long, running)


def test_nobody_who_needs_room_goes_past_one_who_found_none():
    half, long, short = request("half", 544, 544, 40), request("b", 544, 544), request("c", 90, 90)
    waiting = budget(half, long, short)
    assert not waiting.admits(long, [half])
    assert not waiting.admits(short, [half])
    waiting.begin_step()
    assert waiting.admits(short, [half])


def test_a_prompt_that_ends_in_this_step_leaves_its_room():
    ending, other = request("a", 544, 544, 300), request("b", 544, 544)
    waiting = budget(ending, other)
    waiting.count(ending, 300, 243)
    assert not waiting.admits(other, [ending])
    waiting.begin_step()
    waiting.count(ending, 300, 244)
    assert waiting.admits(other, [ending])


@pytest.mark.parametrize(
    ("computed", "new", "taken"),
    [
        pytest.param(300, 244, 243, id="more-rows-than-a-step-leaves-the-last-token"),
        pytest.param(300, 100, 100, id="one-that-does-not-end"),
        pytest.param(200, 344, 344, id="both-fit-a-step"),
        pytest.param(543, 1, 0, id="its-last-token-alone-waits"),
    ],
)
def test_rows_of_several_prompts_come_back_in_one_step_where_they_fit_it(computed, new, taken):
    first, second = request("a", 544, 544, 300), request("b", 544, 544, computed)
    plain = request("plain", 0, 544, computed)
    waiting = budget(first, second)
    assert waiting.chunk(first, 300, 244) == 244
    waiting.count(first, 300, 244)
    assert waiting.chunk(second, computed, new) == taken
    assert waiting.chunk(plain, computed, new) == new
    waiting.begin_step()
    assert waiting.chunk(second, computed, new) == new


def test_tokens_after_the_prompt_are_as_many_as_asked_for():
    first, replayed = request("a", 544, 544, 300), request("b", 544, 544, 540)
    waiting = budget(first, replayed)
    waiting.count(first, 300, 244)
    # the prompt and tokens that were generated before a preemption
    assert waiting.chunk(replayed, 540, 20) == 3
    waiting.begin_step()
    assert waiting.chunk(replayed, 540, 20) == 20
    replayed.num_computed_tokens = 544
    assert waiting.chunk(replayed, 544, 20) == 20
