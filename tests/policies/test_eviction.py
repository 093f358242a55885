"""KV policies: their counts, who is skipped and why, and what the baselines choose."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.errors import PolicyError
from tokenprune.lengths import Eviction, PhysicalLengths, PromptLayout
from tokenprune.policies import EngineShape, PartitionInputs, PlanSkipped, policies
from tokenprune.policies.kv_random import RandomKV
from tokenprune.policies.lagkv import LagKV
from tokenprune.request import flatten, make_plan, parse_flat, parse_pruning

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)
EVERY = [pytest.param(cls, id=method) for method, cls in policies("kv").items()]
ENGINE = EngineShape(32, (0, 8, 12, 20), 4096, max_model_len=8192)
PROMPT = PromptLayout(5000)


def counts(**parameters):
    return LagKV(**parameters).plan(PROMPT, ENGINE)


def test_there_are_kv_policies():
    assert set(policies("kv")) == {"lagkv", "streaming", "random"}


@pytest.mark.parametrize("cls", EVERY)
@pytest.mark.parametrize(
    ("parameters", "keep"),
    [
        pytest.param({}, 512, id="defaults-of-the-released-class"),
        pytest.param({"keep_ratio": 0.167, "lag": 128}, 21, id="rounded-down"),
        pytest.param({"keep_ratio": 1e-9, "lag": 128}, 1, id="at-least-one"),
        pytest.param({"keep_ratio": 1, "lag": 128}, 128, id="all"),
    ],
)
def test_every_method_keeps_the_same_share_of_a_partition(cls, parameters, keep):
    assert cls(**parameters).plan(PROMPT, ENGINE).keep == (keep,) * 4


def test_defaults_are_those_of_the_released_class():
    policy = LagKV()
    assert (policy.sink, policy.lag, policy.keep_ratio, policy.when) == (
        16,
        1024,
        0.5,
        "prompt_end",
    )


def test_length_after_the_prompt_is_the_published_formula():
    n, sink, lag, keep = 5000, 16, 128, 32
    plan = counts(sink=sink, lag=lag, keep_ratio=0.25)
    published = sink + keep * ((n - sink) // lag - 1) + lag + (n - sink) % lag
    assert plan.lengths.all_stages(n) == (published,) * 4


@pytest.mark.parametrize("budget", [600, 1000, 2500, 4999])
def test_a_budget_is_met_once_the_prompt_is_complete(budget):
    plan = counts(budget_tokens=budget, lag=128)
    held = plan.lengths.physical(5000, 0)
    partitions = (5000 - 16) // 128 - 1
    assert budget - partitions < held <= budget


def test_a_budget_below_the_newest_tokens_keeps_one_token_of_each_partition():
    assert counts(budget_tokens=100, lag=1024).keep == (1,) * 4


def test_partitions_are_counted_on_what_each_stage_holds():
    prompt = PromptLayout(600, ((5, 581),))
    pruning = parse_pruning(
        {
            "visual": {"method": "uniform", "keep_ratio": 0.125},
            "kv": {"method": "lagkv", "lag": 64, "sink": 4, "keep_ratio": 0.25},
        }
    )
    plan = make_plan(pruning, prompt, ENGINE)
    entered = [600 - 576 + kept for kept in plan.visual.kept]
    assert entered[0] > entered[-1]
    expected = [n - max(0, (n - 4) // 64 - 1) * 48 for n in entered]
    assert list(plan.lengths.all_stages(600)) == expected


@pytest.mark.parametrize("cls", EVERY)
@pytest.mark.parametrize(
    ("parameters", "prompt", "max_tokens", "engine", "reason"),
    [
        pytest.param({}, 2000, 63, ENGINE, "context_too_short", id="prompt-and-answer-too-short"),
        pytest.param(
            {"lag": 5000}, 5000, None, ENGINE, "context_too_short", id="engine-ends-too-early"
        ),
        pytest.param({"budget_tokens": 5000}, 5000, 9, ENGINE, "within_budget", id="fits-budget"),
        pytest.param(
            {},
            5000,
            9,
            EngineShape(32, (0,), 4096, kv_unsupported="why"),
            "model_unsupported",
            id="unsupported",
        ),
    ],
)
def test_what_cannot_be_evicted_is_skipped_with_a_reason(
    cls, parameters, prompt, max_tokens, engine, reason
):
    with pytest.raises(PlanSkipped) as skipped:
        cls(**parameters).plan(PromptLayout(prompt), engine, max_tokens=max_tokens)
    assert skipped.value.reason == reason


@pytest.mark.parametrize(
    ("prompt", "max_tokens"),
    [
        pytest.param(2064, 0, id="prompt-alone"),
        pytest.param(64, 2000, id="by-the-answer-alone"),
        pytest.param(64, None, id="as-long-as-the-engine-allows"),
    ],
)
def test_a_context_that_can_grow_long_enough_is_planned(prompt, max_tokens):
    assert LagKV().plan(PromptLayout(prompt), ENGINE, max_tokens=max_tokens).keep == (512,) * 4


def test_one_axis_can_be_skipped_and_the_other_applied():
    pruning = parse_pruning({"visual": {"method": "uniform"}, "kv": {"method": "lagkv"}})
    plan = make_plan(pruning, PromptLayout(5000), ENGINE)
    assert plan.skipped == {"visual": "no_visual_tokens"}
    assert plan.kv is not None
    prompt = PromptLayout(600, ((5, 581),))
    plan = make_plan(pruning, prompt, ENGINE, max_tokens=10)
    assert plan.skipped == {"kv": "context_too_short"}
    assert plan.lengths == plan.visual.lengths
    # rows that later stages drop have no log-probs; evicted ones were computed before
    plan = make_plan(pruning, PromptLayout(5000, ((5, 581),)), ENGINE, prompt_logprobs=True)
    assert plan.skipped == {"visual": "prompt_logprobs"}
    assert plan.kv is not None


@pytest.mark.parametrize(
    ("kv", "param", "message"),
    [
        pytest.param({"keep_ratio": 0}, "keep_ratio", r"a number in \(0, 1\]", id="ratio"),
        pytest.param({"sink": -1}, "sink", r"an integer in \[0, inf\)", id="sink"),
        pytest.param({"lag": 0}, "lag", r"an integer in \[1, inf\)", id="lag"),
        pytest.param({"when": "later"}, "when", "'prompt_end' or 'chunk'", id="when"),
        pytest.param({"budget_tokens": 0}, "budget_tokens", "greater than or equal to 1", id="b"),
        pytest.param(
            {"budget_tokens": 9, "keep_ratio": 0.5}, "budget_tokens", "exclude each other", id="two"
        ),
        pytest.param({"window": 3}, "window", "known keys: budget_tokens", id="unknown"),
        pytest.param(
            {"method": "snapkv"}, "method", "one of lagkv, random, streaming", id="method"
        ),
    ],
)
def test_an_illegal_value_is_refused_by_its_key(kv, param, message):
    with pytest.raises(PolicyError, match=message) as refused:
        parse_pruning({"kv": {"method": "lagkv", **kv}})
    assert refused.value.param == f"pruning.kv.{param}"


def test_flat_keys_say_the_same():
    nested = parse_pruning({"kv": {"method": "lagkv", "budget_tokens": 99, "when": "chunk"}})
    flat = flatten(nested)
    assert flat == {
        "pruning_kv_method": "lagkv",
        "pruning_kv_budget_tokens": 99,
        "pruning_kv_when": "chunk",
    }
    assert parse_flat(flat) == nested


# lengths


@st.composite
def evictions(draw):
    prompt = draw(st.integers(1, 60))
    lag = draw(st.integers(1, 9))
    keep = (draw(st.integers(1, lag)), draw(st.integers(1, lag)))
    eviction = Eviction(draw(st.integers(0, 6)), lag, keep, draw(st.booleans()))
    dropped = tuple(sorted(draw(st.sets(st.integers(0, prompt - 1), max_size=prompt - 1))))
    return PhysicalLengths(prompt, ((), dropped), eviction)


def recursion(lengths, stage, steps):
    """Play the published recursion over `steps`; yield tokens computed, slots and their peak."""
    eviction = lengths.eviction
    cache, done, computed = 0, eviction.sink, 0
    for step in steps:
        entered = sum(p not in lengths.dropped[stage] for p in range(computed, computed + step))
        computed += step
        cache += entered
        peak = cache
        if not eviction.after_prompt or computed >= lengths.num_prompt_tokens:
            partitions = (cache - done) // eviction.lag
            if partitions >= 2:
                cache -= (partitions - 1) * (eviction.lag - eviction.keep[stage])
                done += (partitions - 1) * eviction.keep[stage]
        yield computed, cache, peak


@PROPERTY
@given(evictions(), st.lists(st.integers(1, 17), max_size=12))
def test_counts_are_those_of_the_published_recursion_under_any_chunking(lengths, steps):
    for stage in range(2):
        before = 0
        for computed, held, peak in recursion(lengths, stage, steps):
            assert lengths.physical(computed, stage) == held
            assert lengths.peak(before, computed, stage) == peak
            before = computed


@PROPERTY
@given(evictions(), st.lists(st.integers(1, 17), min_size=1, max_size=12))
def test_no_step_needs_more_than_the_bound_of_all_of_them(lengths, steps):
    total = sum(steps)
    for stage in range(2):
        bound = lengths.highest_peak(total, 17, stage)
        assert bound <= lengths.entered(total, stage)
        assert max(peak for _, _, peak in recursion(lengths, stage, steps)) <= bound


@PROPERTY
@given(evictions(), st.integers(0, 200))
def test_what_is_held_is_never_less_than_sink_and_newest_nor_more_than_entered(lengths, n):
    eviction = lengths.eviction
    for stage in range(2):
        entered, held = lengths.entered(n, stage), lengths.physical(n, stage)
        assert min(entered, eviction.sink + eviction.lag) <= held <= entered
        if held < entered:
            assert entered >= eviction.least


def test_evicting_in_chunks_bounds_the_peak_of_a_long_prompt():
    eviction = Eviction(4, 16, (4,), after_prompt=False)
    lengths = PhysicalLengths(1000, (0,), eviction)
    assert lengths.highest_peak(1000, 64, 0) < 400
    whole = PhysicalLengths(1000, (0,), Eviction(4, 16, (4,), after_prompt=True))
    assert whole.highest_peak(1000, 64, 0) == 1000


# selection


def inputs(**changes):
    values = {
        "num_partitions": 3,
        "first": 0,
        "lag": 8,
        "keep": 3,
        "layer": 1,
        "num_heads": 2,
        "keys": None,
        "values": None,
        "device": torch.device("cpu"),
    }
    return PartitionInputs(**(values | changes))


def test_random_draws_again_for_each_layer_head_and_partition_and_only_for_them():
    kept = RandomKV(seed=5).select(inputs())
    assert kept.shape == (2, 3, 3)
    assert all(a < b for row in kept.flatten(0, 1).tolist() for a, b in itertools.pairwise(row))
    # a partition is drawn alike whichever it is cut down with
    alone = RandomKV(seed=5).select(inputs(num_partitions=1, first=2))
    assert torch.equal(kept[:, 2:], alone)
    others = [RandomKV(seed=6).select(inputs()), RandomKV(seed=5).select(inputs(layer=2))]
    assert not any(torch.equal(kept, other) for other in others)
    assert len({tuple(row) for row in kept.flatten(0, 1).tolist()}) > 1


def test_random_is_even():
    many = RandomKV().select(inputs(num_partitions=4000, keep=2))
    share = torch.bincount(many.flatten(), minlength=8) / many.numel()
    assert share.sub(1 / 8).abs().max() < 0.01


def test_a_huge_seed_is_a_seed():
    a, b = (RandomKV(seed=s).select(inputs(num_partitions=50)) for s in (2**40 + 1, 2**40 + 2))
    assert not torch.equal(a, b)


def test_lagkv_keeps_the_top_of_each_partition():
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 32, 6, generator=generator)
    # a token far from what follows stands out
    keys[:, 5] += 40 * torch.arange(6)
    kept = LagKV().select(inputs(keys=keys, values=values, keep=1))
    assert kept[:, 0, 0].tolist() == [5, 5]
