"""ThinK: the golden example, its counts, who is skipped and why, and what it chooses."""

import json
from pathlib import Path

import pytest
import torch

from tests.plans import reasons
from tokenprune.errors import PolicyError
from tokenprune.kernels import channel_scores
from tokenprune.lengths import DroppedAfterPrompt, DroppedPositions, PhysicalLengths, PromptLayout
from tokenprune.plan import make_plan
from tokenprune.policies import ChannelInputs, PlanSkipped, methods
from tokenprune.policies.channels.base import rounded
from tokenprune.policies.channels.think import Think, value_scores
from tokenprune.request import flatten, parse_flat, parse_pruning
from tokenprune.shape import EngineShape

ENGINE = EngineShape(
    32, (0, 8), 4096, max_model_len=8192, allow_channel_pruning=True, head_size=128, block_size=16
)
PROMPT = PromptLayout(5000)
# the printed inputs of the golden example: six keys, two query heads of one KV head
K = [
    [1, 0.5, -2, 0.1],
    [0, -0.5, 1, 0.2],
    [2, 0.5, 0, -0.1],
    [-1, 1, 1, 0],
    [1, 0, 2, 0.3],
    [0.5, -1, -1, 0.4],
]
V = [[1, 0, 0, 2], [0, 1, 0, 1], [0, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 1, 0.5]]
Q = [[[0.5, 2, 0.1, 1], [1, 1, 0.2, -1]], [[-1, 0.5, 1, 2], [0, 1, 0.5, 3]]]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def golden():
    return json.loads((Path(__file__).parents[2] / "golden" / "think.json").read_text())


def inputs(queries, pieces, scale=0.5):
    num_keys = sum(keys.shape[1] for keys, _ in pieces)
    return ChannelInputs(queries, num_keys, lambda: iter(pieces), scale)


def changed(**changes):
    values = {"allow_channel_pruning": True, "head_size": 128, "block_size": 16}
    return EngineShape(32, (0, 8), 4096, **{**values, **changes})


def test_think_is_the_channel_method():
    assert methods("channels") == {"think": Think}


def test_defaults_are_those_of_the_released_scripts():
    policy = Think()
    assert (policy.keep_ratio, policy.window, policy.recent) == (0.6, 32, 32)
    assert policy.values_keep_ratio is None
    assert policy.pack_generated


@pytest.mark.parametrize("head", [0, 1])
def test_scores_of_one_query_head_are_the_golden_ones(golden, head):
    score = channel_scores(tensor(Q)[head][None], tensor(K)[None])[0]
    assert score.tolist() == pytest.approx(golden[f"think.h{head}.score_meansquare"])
    exact = (score * len(K) * 2).sqrt()
    assert exact.tolist() == pytest.approx(golden[f"think.h{head}.score_exact"])
    kept = Think().select_keys(inputs(tensor(Q)[head][None], [(tensor(K)[None], None)]), 2)
    assert kept[0].tolist() == golden[f"think.h{head}.kept_channels(per query head)"]


def test_query_heads_of_a_kv_head_share_the_golden_choice(golden):
    score = channel_scores(tensor(Q), tensor(K)[None])[0]
    assert score.tolist() == pytest.approx(golden["think.group.score(GQA mean of q^2)"])
    kept = Think().select_keys(inputs(tensor(Q), [(tensor(K)[None], None)]), 2)
    assert kept[0].tolist() == golden["think.group.kept_channels"]


def test_value_scores_are_the_golden_ones(golden):
    for head in range(2):
        one = inputs(tensor(Q)[head][None], [(tensor(K)[None], tensor(V)[None])])
        expected = [x**2 for x in golden[f"think.h{head}.value_score"]]
        assert value_scores(one)[0].tolist() == pytest.approx(expected, rel=1e-5)
    both = inputs(tensor(Q), [(tensor(K)[None], tensor(V)[None])])
    summed = [
        a**2 + b**2
        for a, b in zip(golden["think.h0.value_score"], golden["think.h1.value_score"], strict=True)
    ]
    assert value_scores(both)[0].tolist() == pytest.approx(summed, rel=1e-5)
    top = sorted(sorted(range(4), key=lambda i: -summed[i])[:2])
    assert Think().select_values(both, 2)[0].tolist() == top


def test_the_golden_share_of_bytes_is_saved_before_rounding(golden):
    # 77 of 128 key channels; blocks round it, so the plan of the nearest multiple is given too
    saved = golden["think.kv_bytes_saved(lambda=.4, D=128, K only)"]
    assert saved == (128 - 77) / 256
    plan = Think(keep_ratio=0.6).plan(PROMPT, ENGINE)
    assert plan.width == 80 + 128
    assert plan.packing.tokens == 16 * 256 // 208


def test_keys_and_values_may_come_in_pieces():
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(6, 5, 16, generator=generator)
    keys, values = torch.randn(2, 3, 40, 16, generator=generator)
    keys[:, 30] *= 9  # the largest logits lie in the last piece
    whole = inputs(queries, [(keys, values)])
    cuts = [(0, 1), (1, 23), (23, 38), (38, 40)]  # the window of five is cut, too
    pieces = inputs(queries, [(keys[:, a:b], values[:, a:b]) for a, b in cuts])
    policy = Think()
    assert torch.equal(policy.select_keys(whole, 5), policy.select_keys(pieces, 5))
    torch.testing.assert_close(value_scores(whole), value_scores(pieces), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("piece", [6, 2])
def test_a_query_that_sees_no_key_contributes_nothing_to_value_scores(piece):
    # two keys were evicted from a prompt of eight, so a window of eight is longer than the cache
    keys, values = tensor([K]), tensor([V])
    pieces = list(zip(keys.split(piece, 1), values.split(piece, 1), strict=True))
    queries = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(3)).double()
    found = value_scores(inputs(queries, pieces))
    assert found.isfinite().all()
    seeing = value_scores(inputs(queries[:, 2:], pieces))
    torch.testing.assert_close(found, seeing, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("ratio", "size", "kept"),
    [
        pytest.param(0.6, 128, 80, id="up"),
        pytest.param(0.5, 128, 64, id="exact"),
        pytest.param(0.4, 128, 48, id="down"),
        pytest.param(0.01, 128, 16, id="at-least-sixteen"),
        pytest.param(1.0, 72, 72, id="never-more-than-there-are"),
        pytest.param(0.5, 96, 48, id="96"),
        pytest.param(0.5, 32, 16, id="32"),
    ],
)
def test_channels_are_rounded_to_a_multiple_of_sixteen(ratio, size, kept):
    assert rounded(ratio, size) == kept


@pytest.mark.parametrize(
    ("parameters", "prompt", "engine", "max_tokens", "reason"),
    [
        pytest.param(
            {},
            5000,
            changed(allow_channel_pruning=False),
            9,
            "channels_not_allowed",
            id="not-allowed",
        ),
        pytest.param(
            {},
            5000,
            changed(unsupported={"channels": "why"}),
            9,
            "model_unsupported",
            id="unsupported",
        ),
        pytest.param({}, 63, changed(), None, "prompt_too_short", id="window-and-recent"),
        pytest.param({"keep_ratio": 1}, 5000, changed(), 9, "no_gain", id="keeps-all"),
        pytest.param({}, 5000, changed(head_size=16), 9, "no_gain", id="head-of-one-multiple"),
        pytest.param(
            {"keep_ratio": 0.99}, 5000, changed(), 9, "no_gain", id="rounded-up-to-all-channels"
        ),
        pytest.param(
            {}, 64, changed(block_size=64), 10, "context_too_short", id="never-a-whole-block"
        ),
    ],
)
def test_what_saves_nothing_is_skipped_with_a_reason(
    parameters, prompt, engine, max_tokens, reason
):
    with pytest.raises(PlanSkipped) as skipped:
        Think(**parameters).plan(PromptLayout(prompt), engine, None, max_tokens)
    assert skipped.value.skipped.reason == reason


def test_a_prompt_of_window_and_recent_is_packed_as_it_grows():
    plan = make_plan(asked(), PromptLayout(64), ENGINE, max_tokens=100)
    assert plan.lengths.packing.tokens == 21
    assert plan.lengths.packed_blocks(64, 0) == 1
    assert plan.lengths.packed_blocks(164, 0) == (164 - 32) // 21


def asked(kv=None, **channels):
    axes = {"channels": {"method": "think", "keep_ratio": 0.5, **channels}}
    return parse_pruning(axes if kv is None else axes | {"kv": kv})


def test_at_half_the_key_channels_a_long_prompt_holds_a_fifth_fewer_slots():
    plan = make_plan(asked(), PROMPT, ENGINE)
    blocks = -(-plan.lengths.physical(5000, 0) // 16)
    assert blocks <= 0.8 * -(-5000 // 16)


def test_half_of_the_values_too_saves_more():
    keys = make_plan(asked(), PROMPT, ENGINE)
    both = make_plan(asked(values_keep_ratio=0.5), PROMPT, ENGINE)
    assert both.channels.width == 128
    assert both.lengths.physical(5000, 0) < 0.7 * keys.lengths.physical(5000, 0)


def test_tokens_are_evicted_first_and_then_packed():
    kv = {"method": "lagkv", "lag": 128, "sink": 4, "keep_ratio": 0.5}
    plan = make_plan(asked(kv), PROMPT, ENGINE)
    cut = (5000 - 4) // 128 - 1
    assert plan.lengths.tokens_held(5000, 0) == 5000 - cut * 64
    assert plan.lengths.packed_blocks(5000, 0) == (4 + cut * 64) // 21
    assert plan.lengths.eviction == plan.kv.eviction


def test_packed_tokens_cannot_be_those_a_window_gives_up():
    plan = make_plan(asked({"method": "streaming", "lag": 128}), PROMPT, ENGINE)
    assert reasons(plan) == {"channels": "oldest_tokens_evicted"}
    assert plan.lengths.packing is None


def test_a_skipped_kv_method_is_no_hindrance():
    plan = make_plan(asked({"method": "streaming", "lag": 8000}), PROMPT, ENGINE)
    assert reasons(plan) == {"kv": "context_too_short"}
    assert plan.lengths.packed_blocks(5000, 0) == (5000 - 32) // 21


def test_flat_keys_say_the_same():
    pruning = asked(values_keep_ratio=0.75, recent=8, pack_generated=False)
    assert parse_flat(flatten(pruning)) == pruning


@pytest.mark.parametrize(
    ("channels", "param", "rule"),
    [
        pytest.param({"keep_ratio": 0}, "keep_ratio", "(0, 1]", id="zero"),
        pytest.param({"values_keep_ratio": 2}, "values_keep_ratio", "", id="values-above-one"),
        pytest.param({"window": 0}, "window", "[1, 256]", id="no-window"),
        pytest.param({"recent": -1}, "recent", "[0, 2147483647]", id="negative-recent"),
        pytest.param({"ratio": 0.5}, "ratio", "known keys: keep_ratio", id="unknown-key"),
        pytest.param({"method": "thin"}, "method", "think", id="unknown-method"),
    ],
)
def test_bad_values_are_refused_by_their_key(channels, param, rule):
    with pytest.raises(PolicyError) as refused:
        parse_pruning({"channels": {"method": "think", **channels}})
    assert refused.value.param == f"pruning.channels.{param}"
    assert rule in str(refused.value)


def test_only_stages_that_hold_enough_are_packed():
    dropped = (DroppedAfterPrompt(4990, 5000), DroppedPositions())
    lengths = PhysicalLengths(5000, dropped)
    plan = Think(keep_ratio=0.5).plan(PROMPT, ENGINE, lengths, max_tokens=9)
    assert plan.packing.tokens == 21
    few = PhysicalLengths(5000, dropped[:1] * 2)
    with pytest.raises(PlanSkipped, match="context_too_short"):
        Think(keep_ratio=0.5).plan(PROMPT, ENGINE, few, max_tokens=9)
