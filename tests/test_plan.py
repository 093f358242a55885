"""Plans: parts of the axes, the lengths that follow, and what is refused or skipped."""

from dataclasses import replace

import pytest

from tests.plans import reasons
from tokenprune.errors import PolicyError
from tokenprune.lengths import MANY, PhysicalLengths, PromptLayout
from tokenprune.plan import DEFAULT_REFUSED, make_default_plan, make_plan
from tokenprune.policies import PromptPolicy, methods
from tokenprune.request import OFF, parse_flat, parse_pruning
from tokenprune.shape import EngineShape

ENGINE = EngineShape(32, (0, 8, 12, 20), 4096)
PROMPT = PromptLayout(600, ((5, 581),))


@pytest.mark.parametrize("method", list(methods("visual")))
def test_a_plan_carries_the_lengths_of_its_axis(method):
    asked = parse_pruning({"visual": {"method": method, "keep_ratio": 0.25}})
    plan = make_plan(asked, PROMPT, ENGINE)
    assert plan.pruning is asked
    assert not plan.skipped
    assert plan.visual.kept[-1] == 131 if method == "vflowopt" else 144
    assert plan.is_pruned
    assert plan.lengths == PhysicalLengths(600, plan.visual.dropped)
    waits = issubclass(methods("visual")[method], PromptPolicy)
    assert [plan.waiting_rows(n) for n in (5, 6, 600)] == ([0, 1, 595] if waits else [0, 0, 0])


def test_off_plans_nothing_and_skips_nothing():
    plan = make_plan(OFF, PROMPT, ENGINE)
    assert plan.visual is None
    assert not plan.is_pruned
    assert plan.lengths.all_stages(77) == (77,) * plan.lengths.num_stages
    assert not plan.skipped
    assert plan.waiting_rows(600) == 0


@pytest.mark.parametrize(
    ("prompt", "engine", "reason"),
    [
        pytest.param(PromptLayout(600), ENGINE, "no_visual_tokens", id="text-only"),
        pytest.param(PromptLayout(9, ((0, 9),)), ENGINE, "no_text_after_image", id="image-last"),
        pytest.param(
            PROMPT,
            EngineShape(32, (0, 8), 4096, max_num_waiting_tokens=594),
            "prompt_exceeds_waiting_tokens",
            id="longer-than-can-wait",
        ),
        pytest.param(
            PROMPT,
            EngineShape(32, (0,), 4096, {"visual": "why"}),
            "model_unsupported",
            id="unsupported-model",
        ),
    ],
)
def test_what_cannot_be_pruned_is_skipped_with_its_reason(prompt, engine, reason):
    plan = make_plan(parse_pruning("balanced"), prompt, engine)
    assert reasons(plan) == {"visual": reason}
    assert not plan.is_pruned
    assert plan.lengths.all_stages(77) == (77,) * plan.lengths.num_stages
    assert plan.waiting_rows(600) == 0


def test_a_prompt_whose_log_probs_are_wanted_keeps_all_its_rows():
    asked = parse_pruning("balanced")
    assert make_plan(asked, PROMPT, ENGINE, prompt_logprobs=False).is_pruned
    plan = make_plan(asked, PROMPT, ENGINE, prompt_logprobs=True)
    assert reasons(plan) == {"visual": "prompt_logprobs"}
    assert not plan.is_pruned
    assert plan.lengths.all_stages(77) == (77,) * plan.lengths.num_stages
    assert not make_plan(OFF, PROMPT, ENGINE, prompt_logprobs=True).skipped


def test_a_schedule_that_does_not_fit_the_engine_is_refused_not_skipped():
    asked = parse_pruning({"visual": {"method": "uniform", "prune_layers": [9]}})
    with pytest.raises(PolicyError, match=r"\[0, 8, 12, 20\]"):
        make_plan(asked, PROMPT, ENGINE)


def test_plans_of_equal_requests_are_equal():
    plans = [
        make_plan(parse(value), PROMPT, ENGINE)
        for parse, value in [
            (parse_pruning, {"visual": {"method": "random", "keep_ratio": 0.25, "seed": 3}}),
            (
                parse_flat,
                {
                    "pruning_visual_method": "random",
                    "pruning_visual_keep_ratio": 0.25,
                    "pruning_visual_seed": 3,
                },
            ),
        ]
    ]
    assert plans[0] == plans[1]


ALL_UNSUPPORTED = EngineShape(
    32,
    (0,),
    4096,
    dict.fromkeys(("visual", "importance", "kv", "channels"), "it is made of wood"),
    allow_channel_pruning=True,
)


@pytest.mark.parametrize(
    ("asked", "prompt", "engine", "message", "param"),
    [
        pytest.param(
            {"visual": {"method": "uniform"}},
            PROMPT,
            ALL_UNSUPPORTED,
            "pruning.visual must be left out with this model: it is made of wood",
            "pruning.visual",
            id="visual",
        ),
        pytest.param(
            {"visual": {"method": "vflowopt"}},
            PROMPT,
            EngineShape(32, (0, 8), 4096, {"importance": "it is blind"}),
            "pruning.visual.method must be another than vflowopt with this server: it is blind",
            "pruning.visual.method",
            id="importance",
        ),
        pytest.param(
            {"visual": {"method": "vflowopt"}},
            PROMPT,
            EngineShape(32, (0, 8), 500),
            "an image must have at most 500 tokens for pruning.visual.method vflowopt, which "
            "takes it in one step, got 576; raise --max-num-batched-tokens or use another method",
            "pruning.visual.method",
            id="long-image",
        ),
        pytest.param(
            {"visual": {"method": "transprune"}},
            PROMPT,
            EngineShape(32, (0, 8), 4096, max_num_waiting_tokens=500),
            "the prompt must have at most 500 tokens from the first image on for "
            "pruning.visual.method transprune, which chooses once it is complete, got 595; raise "
            "--max-num-waiting-tokens or use another method",
            "pruning.visual.method",
            id="long-prompt",
        ),
        pytest.param(
            {"kv": {"method": "lagkv"}},
            PROMPT,
            ALL_UNSUPPORTED,
            "pruning.kv must be left out with this server: it is made of wood",
            "pruning.kv",
            id="kv",
        ),
        pytest.param(
            {"channels": {"method": "think"}},
            PROMPT,
            ALL_UNSUPPORTED,
            "pruning.channels must be left out with this server: it is made of wood",
            "pruning.channels",
            id="channels",
        ),
        pytest.param(
            {"channels": {"method": "think"}},
            PROMPT,
            ENGINE,
            "pruning.channels must be left out with this server; start it with "
            "--allow-channel-pruning",
            "pruning.channels",
            id="channels-not-allowed",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_by_its_key_or_skipped(asked, prompt, engine, message, param):
    plan = make_plan(parse_pruning(asked), prompt, engine)
    assert not plan.is_pruned
    with pytest.raises(PolicyError) as refused:
        plan.refuse_what_is_skipped()
    assert str(refused.value) == message
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("asked", "prompt", "engine"),
    [
        pytest.param("balanced", PromptLayout(600), ENGINE, id="no-image"),
        pytest.param("balanced", PromptLayout(600), ALL_UNSUPPORTED, id="no-image-to-prune"),
        pytest.param({"kv": {"method": "lagkv"}}, PromptLayout(9), ENGINE, id="short"),
    ],
)
def test_where_there_is_nothing_to_prune_nothing_is_refused(asked, prompt, engine):
    plan = make_plan(parse_pruning(asked), prompt, engine, max_tokens=9)
    assert plan.skipped
    plan.refuse_what_is_skipped()


def test_the_default_is_skipped_where_it_would_be_refused():
    asked = parse_pruning(
        {"visual": {"method": "uniform", "prune_layers": [9]}, "kv": {"method": "lagkv"}}
    )
    plan = make_default_plan(asked, PROMPT, ENGINE)
    assert reasons(plan) == {"visual": DEFAULT_REFUSED, "kv": DEFAULT_REFUSED}
    assert plan.lengths == PhysicalLengths.unpruned(600, 4)


def test_the_widest_window_of_queries_counts():
    engine = EngineShape(32, (0,), 4096, allow_channel_pruning=True, head_size=64, block_size=16)
    asked = parse_pruning({"channels": {"method": "think", "window": 7}, "kv": {"method": "lagkv"}})
    assert make_plan(asked, PromptLayout(5000), engine).query_window == 7
    assert make_plan(OFF, PromptLayout(5000), engine).query_window == 0


IMAGE_AT_100 = PromptLayout(1000, ((100, 400),))
SMALL = {"method": "lagkv", "sink": 16, "lag": 64}


@pytest.mark.parametrize(
    ("asked", "prompt", "shared", "longest"),
    [
        pytest.param({"kv": SMALL}, PromptLayout(1000), MANY, 999, id="evicts-after-the-prompt"),
        pytest.param(
            {"kv": SMALL | {"when": "chunk"}}, PromptLayout(1000), MANY, 143, id="after-a-chunk"
        ),
        pytest.param({"kv": SMALL}, PromptLayout(50), MANY, 143, id="while-it-answers"),
        pytest.param(
            {"kv": SMALL | {"keep_ratio": 1}}, PromptLayout(1000), MANY, MANY - 1, id="keeps-all"
        ),
        pytest.param({"visual": {"method": "uniform"}}, IMAGE_AT_100, 100, 100, id="ranks"),
        pytest.param({"visual": {"method": "vflowopt"}}, IMAGE_AT_100, 100, 100, id="images"),
        pytest.param({"visual": {"method": "transprune"}}, IMAGE_AT_100, 100, 100, id="whole"),
        pytest.param(
            {"visual": {"method": "uniform"}, "kv": SMALL | {"when": "chunk", "lag": 32}},
            IMAGE_AT_100,
            100,
            79,
            id="both",
        ),
        pytest.param(
            {"channels": {"method": "think", "window": 32}},
            PromptLayout(1000),
            MANY,
            968,
            id="a-window-of-queries",
        ),
        # the last rows of a stage that holds 730 tokens of the prompt
        pytest.param(
            {
                "channels": {"method": "think", "window": 200, "recent": 8},
                "visual": {"method": "uniform", "keep_ratio": 0.1},
            },
            PromptLayout(500, ((190, 490),)),
            190,
            30,
            id="a-window-before-the-image",
        ),
    ],
)
def test_a_cached_prefix_ends_where_something_else_would_be_computed(
    asked, prompt, shared, longest
):
    engine = replace(ENGINE, allow_channel_pruning=True, head_size=64, block_size=16)
    plan = make_plan(parse_pruning(asked), prompt, engine)
    assert plan.is_pruned
    assert (plan.shared_tokens, plan.longest_hit) == (shared, longest)
    for n in range(min(plan.longest_hit, 2000) + 1):
        assert plan.lengths.all_stages(n) == (n,) * engine.num_stages
