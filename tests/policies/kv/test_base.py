"""What all KV policies share: their counts, who is skipped and why, and which keys are legal."""

import pytest

from tests.plans import reasons
from tokenprune.errors import PolicyError
from tokenprune.lengths import DroppedPositions, PhysicalLengths, PromptLayout
from tokenprune.plan import make_plan
from tokenprune.policies import PlanSkipped, methods
from tokenprune.policies.kv.lagkv import LagKV
from tokenprune.request import flatten, parse_flat, parse_pruning
from tokenprune.shape import EngineShape

EVERY = [pytest.param(cls, id=method) for method, cls in methods("kv").items()]
ENGINE = EngineShape(32, (0, 8, 12, 20), 4096, max_model_len=8192)
PROMPT = PromptLayout(5000)


def counts(**parameters):
    return LagKV(**parameters).plan(PROMPT, ENGINE)


def lengths_of(plan):
    return PhysicalLengths(PROMPT.num_tokens, (DroppedPositions(),) * 4, plan.eviction)


def test_there_are_kv_policies():
    assert set(methods("kv")) == {"lagkv", "streaming", "random"}


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
    assert cls(**parameters).plan(PROMPT, ENGINE).eviction.keep == (keep,) * 4


def test_length_after_the_prompt_is_the_published_formula():
    n, sink, lag, keep = 5000, 16, 128, 32
    plan = counts(sink=sink, lag=lag, keep_ratio=0.25)
    published = sink + keep * ((n - sink) // lag - 1) + lag + (n - sink) % lag
    assert lengths_of(plan).all_stages(n) == (published,) * 4


@pytest.mark.parametrize("budget", [600, 1000, 2500, 4999])
def test_a_budget_is_met_once_the_prompt_is_complete(budget):
    plan = counts(budget_tokens=budget, lag=128)
    held = lengths_of(plan).physical(5000, 0)
    partitions = (5000 - 16) // 128 - 1
    assert budget - partitions < held <= budget


def test_a_budget_below_the_newest_tokens_keeps_one_token_of_each_partition():
    assert counts(budget_tokens=100, lag=1024).eviction.keep == (1,) * 4


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
            EngineShape(32, (0,), 4096, unsupported={"kv": "why"}),
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
    assert skipped.value.skipped.reason == reason


@pytest.mark.parametrize(
    ("prompt", "max_tokens"),
    [
        pytest.param(2064, 0, id="prompt-alone"),
        pytest.param(64, 2000, id="by-the-answer-alone"),
        pytest.param(64, None, id="as-long-as-the-engine-allows"),
    ],
)
def test_a_context_that_can_grow_long_enough_is_planned(prompt, max_tokens):
    plan = LagKV().plan(PromptLayout(prompt), ENGINE, max_tokens=max_tokens)
    assert plan.eviction.keep == (512,) * 4


def test_one_axis_can_be_skipped_and_the_other_applied():
    pruning = parse_pruning({"visual": {"method": "uniform"}, "kv": {"method": "lagkv"}})
    plan = make_plan(pruning, PromptLayout(5000), ENGINE)
    assert reasons(plan) == {"visual": "no_visual_tokens"}
    assert plan.kv is not None
    prompt = PromptLayout(600, ((5, 581),))
    plan = make_plan(pruning, prompt, ENGINE, max_tokens=10)
    assert reasons(plan) == {"kv": "context_too_short"}
    assert plan.lengths == PhysicalLengths(600, plan.visual.dropped)
    # rows that later stages drop have no log-probs; evicted ones were computed before
    plan = make_plan(pruning, PromptLayout(5000, ((5, 581),)), ENGINE, prompt_logprobs=True)
    assert reasons(plan) == {"visual": "prompt_logprobs"}
    assert plan.kv is not None


@pytest.mark.parametrize(
    ("kv", "param", "message"),
    [
        pytest.param({"keep_ratio": 0}, "keep_ratio", r"a number in \(0, 1\]", id="ratio"),
        pytest.param({"sink": -1}, "sink", r"an integer in \[0, 2147483647\]", id="sink"),
        pytest.param({"lag": 15}, "lag", r"an integer in \[16, 2147483647\]", id="lag"),
        pytest.param({"when": "later"}, "when", "'prompt_end' or 'chunk'", id="when"),
        pytest.param({"budget_tokens": 0}, "budget_tokens", r"\[1, 2147483647\], got 0", id="b"),
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
