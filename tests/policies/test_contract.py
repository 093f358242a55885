"""What every registered policy promises; a new policy is covered without an edit here."""

import itertools
import subprocess
import sys
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tokenprune.errors import PolicyError
from tokenprune.lengths import PhysicalLengths, PromptLayout
from tokenprune.policies import (
    AXES,
    ImagePolicy,
    PerImage,
    PlanSkipped,
    PromptPolicy,
    RankPolicy,
    ScheduledPolicy,
    VisualPolicy,
    methods,
    register_policy,
)
from tokenprune.shape import EngineShape

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
EVERY = [
    pytest.param(cls, id=f"{axis}-{method}")
    for axis in AXES
    for method, cls in methods(axis).items()
]
VISUAL = [pytest.param(cls, id=method) for method, cls in methods("visual").items()]
SCHEDULED = [p for p in VISUAL if issubclass(p.values[0], ScheduledPolicy)]
WHOLE = [p for p in VISUAL if issubclass(p.values[0], PromptPolicy)]
IMAGES = [p for p in VISUAL if issubclass(p.values[0], ImagePolicy)]
KNOWN = [p for p in VISUAL if issubclass(p.values[0], RankPolicy)]

ENGINE = EngineShape(num_layers=32, boundaries=(0, 8, 12, 20), max_num_batched_tokens=4096)
# text, an image of 576 tokens, text
PROMPT = PromptLayout(600, ((5, 581),))


def test_every_kind_of_visual_policy_is_covered():
    assert VISUAL
    assert WHOLE
    assert IMAGES
    assert KNOWN
    assert len(WHOLE) + len(IMAGES) + len(KNOWN) == len(VISUAL)


@pytest.mark.parametrize("cls", EVERY)
def test_the_registered_class_is_the_one_of_its_module(cls):
    assert cls is getattr(sys.modules[cls.__module__], cls.__qualname__)
    assert methods(cls.axis)[cls().method] is cls


@pytest.mark.parametrize("cls", EVERY)
def test_a_method_cannot_be_registered_twice(cls):
    with pytest.raises(ValueError, match="already registered"):
        register_policy(cls)


def test_a_class_that_leaves_out_what_its_base_asks_for_cannot_be_registered():
    class Half(VisualPolicy):
        method: Literal["half"] = "half"

    with pytest.raises(TypeError, match="policy Half must define count, cuts"):
        register_policy(Half)
    assert "half" not in methods("visual")


def test_a_class_without_a_method_field_cannot_be_registered():
    class Nameless(ScheduledPolicy, RankPolicy):
        def keep_ranks(self, num_visual, keep):
            return list(range(keep))

    with pytest.raises(TypeError, match="policy Nameless must have a field method"):
        register_policy(Nameless)


@pytest.mark.parametrize("cls", EVERY)
def test_a_policy_is_immutable_and_hides_no_field(cls):
    policy = cls()
    for name in cls.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(policy, name, getattr(policy, name))
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        cls(no_such_parameter=1)


@pytest.mark.parametrize("cls", EVERY)
def test_every_parameter_is_described_in_the_json_schema(cls):
    schema = cls.model_json_schema()
    assert schema["description"]
    described = {name for name, s in schema["properties"].items() if s.get("description")}
    # the method's name is its own description
    assert described == set(schema["properties"]) - {"method"}


def branches(schema):
    """Return the forms that a parameter may have, None left out."""
    return [s for s in schema.get("anyOf", [schema]) if s.get("type") != "null"]


@pytest.mark.parametrize("cls", EVERY)
def test_every_number_has_a_least_and_a_most_and_every_list_a_length(cls):
    for name, schema in cls.model_json_schema()["properties"].items():
        for form in branches(schema):
            if form["type"] in ("number", "integer"):
                assert "minimum" in form or "exclusiveMinimum" in form, name
                assert "maximum" in form, name
            if form["type"] == "array":
                assert form["maxItems"] <= 12, name


def ends(schema):
    """Return the legal values of a parameter that are furthest from the usual ones."""
    for form in branches(schema):
        kind = int if form["type"] == "integer" else float
        if form["type"] in ("number", "integer"):
            yield kind(form.get("minimum", 1e-300))
            yield kind(form["maximum"])


@pytest.mark.parametrize("cls", EVERY)
def test_a_legal_value_however_extreme_is_planned_or_skipped(cls):
    engine = EngineShape(
        32,
        (0, 8, 12, 20),
        4096,
        max_model_len=4096,
        allow_channel_pruning=True,
        head_size=128,
        block_size=16,
    )
    for name, schema in cls.model_json_schema()["properties"].items():
        for value in ends(schema):
            for prompt in (PROMPT, PromptLayout(3, ((0, 1),)), PromptLayout(4000, ((9, 3900),))):
                try:
                    cls(**{name: value}).plan(prompt, engine)
                except PlanSkipped:
                    continue


@pytest.mark.parametrize("cls", EVERY)
def test_a_policy_survives_json(cls):
    policy = cls()
    assert cls.model_validate_json(policy.model_dump_json()) == policy


@st.composite
def cases(draw):
    depth = draw(st.integers(2, 40))
    inner = draw(st.sets(st.integers(1, depth - 1), min_size=1, max_size=4))
    engine = EngineShape(depth, (0, *sorted(inner)), 10_000)
    spans, end = [], 0
    for text, visual in draw(
        st.lists(st.tuples(st.integers(0, 9), st.integers(1, 300)), max_size=3)
    ):
        spans.append((end + text, end + text + visual))
        end += text + visual
    if not spans:
        spans, end = [(2, 9)], 9
    layout = PromptLayout(end + draw(st.integers(1, 9)), tuple(spans))
    ratio = draw(st.floats(0, 1, exclude_min=True))
    parameters = {"keep_ratio": ratio}
    layers = draw(st.sets(st.sampled_from(engine.boundaries), min_size=1))
    return parameters, sorted(layers), layout, engine


def cut_at(cls, parameters, layers):
    """Return the policy, with layers of its own where the method takes any number of them."""
    if issubclass(cls, ScheduledPolicy) and len(layers) % 2:
        return cls(**parameters, prune_layers=layers)
    return cls(**parameters)


@pytest.mark.parametrize("cls", VISUAL)
@PROPERTY
@given(case=cases())
def test_a_plan_is_the_same_each_time_and_never_grows(cls, case):
    parameters, layers, layout, engine = case
    plan = cut_at(cls, parameters, layers).plan(layout, engine)
    assert plan == cut_at(cls, parameters, layers).plan(layout, engine)
    assert len(plan.kept) == len(engine.boundaries)
    assert all(a >= b for a, b in itertools.pairwise((layout.num_visual, *plan.kept)))
    layers = [layer for layer, _ in plan.cuts]
    assert layers == sorted(set(layers))
    assert set(layers) <= set(engine.boundaries)
    # each part that is chosen from by itself keeps the floor of its share, at least one
    spans = layout.visual_spans if isinstance(plan, PerImage) else [(0, layout.num_visual)]
    for boundary, kept in zip(engine.boundaries, plan.kept, strict=True):
        in_force = [r for layer, r in plan.cuts if layer <= boundary]
        share = in_force[-1] if in_force else 1
        assert kept == sum(max(1, int((end - start) * share)) for start, end in spans)


@pytest.mark.parametrize("cls", SCHEDULED)
@PROPERTY
@given(case=cases())
def test_the_last_cut_of_a_schedule_is_exact(cls, case):
    parameters, layers, layout, engine = case
    plan = cut_at(cls, parameters, layers).plan(layout, engine)
    assert plan.kept[-1] == max(1, int(layout.num_visual * parameters["keep_ratio"]))


def lengths_of(plan, prompt):
    return PhysicalLengths(prompt.num_tokens, plan.dropped)


@pytest.mark.parametrize("cls", VISUAL)
@PROPERTY
@given(case=cases())
def test_lengths_follow_from_the_counts(cls, case):
    parameters, layers, layout, engine = case
    plan = cut_at(cls, parameters, layers).plan(layout, engine)
    complete = lengths_of(plan, layout).all_stages(layout.num_tokens)
    assert complete == tuple(layout.num_tokens - layout.num_visual + k for k in plan.kept)


@pytest.mark.parametrize("cls", KNOWN)
@PROPERTY
@given(case=cases())
def test_ranks_are_nested_and_only_visual_positions_are_dropped(cls, case):
    parameters, layers, layout, engine = case
    plan = cut_at(cls, parameters, layers).plan(layout, engine)
    positions = layout.visual_positions()
    outer = set(range(layout.num_visual))
    for kept, ranks, dropped in zip(plan.kept, plan.ranks, plan.dropped, strict=True):
        assert list(ranks) == sorted(set(ranks))
        assert len(ranks) == kept
        assert set(ranks) <= outer
        outer = set(ranks)
        assert list(dropped.positions) == sorted(set(positions) - {positions[r] for r in ranks})


@pytest.mark.parametrize("cls", KNOWN)
@pytest.mark.parametrize(
    ("num_visual", "keep"),
    [(1, 1), (2, 1), (7, 3), (7, 6), (7, 7), (576, 1), (576, 72), (577, 360)],
)
def test_kept_ranks_ascend_without_repeats_in_range(cls, num_visual, keep):
    ranks = cls().keep_ranks(num_visual, keep)
    assert len(ranks) == keep
    assert ranks == sorted(set(ranks))
    assert ranks[0] >= 0
    assert ranks[-1] < num_visual


@pytest.mark.parametrize("cls", IMAGES)
@PROPERTY
@given(case=cases())
def test_a_choice_per_image_counts_each_image_and_holds_between_images(cls, case):
    parameters, _, layout, engine = case
    plan = cls(**parameters).plan(layout, engine)
    lengths = lengths_of(plan, layout)
    assert tuple((i.start, i.end) for i in plan.images) == layout.visual_spans
    for n in range(layout.num_tokens + 1):
        end = plan.chunk_end(n)
        inside = [i for i in plan.images if i.start < n < i.end]
        assert end == (inside[0].start if inside else n)
        for stage, held in enumerate(lengths.all_stages(end)):
            gone = sum(i.end - i.start - i.kept[stage] for i in plan.images if i.end <= end)
            assert held == end - gone


@pytest.mark.parametrize("cls", IMAGES)
def test_an_image_fits_one_step_or_is_skipped(cls):
    plan = cls().plan(*without(max_num_batched_tokens=576))
    assert plan.images
    for prompt, room in ((PROMPT, 575), (PromptLayout(700, ((1, 40), (90, 691))), 600)):
        with pytest.raises(PlanSkipped, match="image_exceeds_batch"):
            cls().plan(*without(prompt, max_num_batched_tokens=room))


@pytest.mark.parametrize("cls", IMAGES)
def test_a_tower_that_cannot_be_read_is_skipped_with_a_reason(cls):
    with pytest.raises(PlanSkipped, match="importance_unsupported"):
        cls().plan(*without(unsupported={"importance": "why"}))


@pytest.mark.parametrize("cls", WHOLE)
def test_a_choice_by_tensors_is_counted_not_named(cls):
    plan = cls(keep_ratio=0.25).plan(PROMPT, ENGINE)
    assert [d.count for d in plan.dropped] == [576 - k for k in plan.kept]
    # before the whole prompt is there, stages that drop any wait
    lengths = lengths_of(plan, PROMPT)
    waiting = [k < 576 for k in plan.kept]
    assert lengths.all_stages(599) == tuple(5 if w else 599 for w in waiting)
    assert lengths.first_waiting == waiting.index(True)


@pytest.mark.parametrize("cls", VISUAL)
def test_keep_ratio_one_keeps_everything(cls):
    plan = cls(keep_ratio=1).plan(PROMPT, ENGINE)
    assert plan.kept == (576,) * 4
    for n in (0, 100, 600, 700):
        assert lengths_of(plan, PROMPT).all_stages(n) == (n,) * 4


@pytest.mark.parametrize("cls", SCHEDULED)
@pytest.mark.parametrize(
    ("ratio", "kept"), [(1e-9, 1), (1 / 577, 1), (0.5, 288), (0.9999, 575), (0.1, 57)]
)
def test_keep_is_the_floor_of_the_original_count_and_at_least_one(cls, ratio, kept):
    assert cls(keep_ratio=ratio).plan(PROMPT, ENGINE).kept[-1] == kept


@pytest.mark.parametrize("cls", SCHEDULED)
def test_the_last_cut_is_exact_where_one_minus_one_minus_the_ratio_is_less(cls):
    assert 1 - (1 - 0.1) < 0.1
    assert cls(keep_ratio=0.1).plan(PromptLayout(120, ((5, 105),)), ENGINE).kept[-1] == 10


@pytest.mark.parametrize("cls", SCHEDULED)
def test_own_layers_and_ratios_replace_the_published_schedule(cls):
    policy = cls(prune_layers=[0, 12], keep_ratios=[0.5, 0.25])
    plan = policy.plan(PROMPT, ENGINE)
    assert plan.cuts == ((0, 0.5), (12, 0.25))
    assert plan.kept == (288, 288, 144, 144)


@pytest.mark.parametrize("cls", SCHEDULED)
def test_own_layers_share_keep_ratio_in_even_steps(cls):
    plan = cls(prune_layers=[8, 20], keep_ratio=0.5).plan(PROMPT, ENGINE)
    assert plan.cuts == ((8, 0.75), (20, 0.5))


def without(prompt=PROMPT, **changes):
    values = {"num_layers": 32, "boundaries": ENGINE.boundaries, "max_num_batched_tokens": 4096}
    return prompt, EngineShape(**{**values, **changes})


@pytest.mark.parametrize("cls", VISUAL)
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        pytest.param(without(PromptLayout(600)), "no_visual_tokens", id="text-only"),
        pytest.param(without(unsupported={"visual": "why"}), "model_unsupported", id="unsupported"),
        pytest.param(
            without(unsupported={"visual": "why"}, boundaries=(0,)),
            "model_unsupported",
            id="and-no-boundaries",
        ),
        pytest.param(
            without(PromptLayout(600, ((5, 600),))), "no_text_after_image", id="image-last"
        ),
    ],
)
def test_nothing_to_prune_is_skipped_with_a_reason(cls, case, reason):
    with pytest.raises(PlanSkipped) as skipped:
        cls().plan(*case)
    assert skipped.value.skipped.reason == reason


@pytest.mark.parametrize("cls", SCHEDULED)
def test_one_text_token_after_the_image_is_enough(cls):
    assert cls(keep_ratio=0.5).plan(PromptLayout(582, ((5, 581),)), ENGINE).kept[-1] == 288


@pytest.mark.parametrize("cls", WHOLE)
def test_a_prompt_that_must_be_whole_has_room_to_wait_or_is_skipped(cls):
    # whatever a step holds, and but for the text before the image
    prompt, engine = without(max_num_waiting_tokens=595, max_num_batched_tokens=16)
    plan = cls(keep_ratio=0.5).plan(prompt, engine)
    assert (plan.kept[-1], plan.waiting_rows(600)) == (288, 595)
    with pytest.raises(PlanSkipped, match="prompt_exceeds_waiting_tokens") as skipped:
        cls().plan(*without(max_num_waiting_tokens=594))
    assert "at most 594 tokens from the first image on" in skipped.value.skipped.message
    assert "--max-num-waiting-tokens" in skipped.value.skipped.message


@pytest.mark.parametrize("cls", WHOLE)
def test_text_before_the_image_waits_too_where_its_keys_cannot_be_read_again(cls):
    plan = cls(keep_ratio=0.5).plan(*without(unsupported={"kv": "why"}))
    assert plan.waiting_rows(600) == 600


@pytest.mark.parametrize("cls", WHOLE)
def test_features_that_come_late_wait_with_their_rows(cls):
    def waiting(num_late, **policy):
        changes = {"num_late": num_late, "max_num_waiting_tokens": 2380}
        return cls(**policy).plan(*without(**changes)).waiting_rows(600)

    assert waiting(8, prune_layers=[8], keep_ratio=0.5) == 595
    assert waiting(3, prune_layers=[0], keep_ratio=0.5) == 4 * 595
    assert waiting(3, prune_layers=[0, 8], keep_ratios=[1, 0.5]) == 595
    assert waiting(3, prune_layers=[0], keep_ratios=[1]) == 0
    with pytest.raises(PlanSkipped) as skipped:
        waiting(4, prune_layers=[0], keep_ratio=0.5)
    assert "at most 476 tokens" in skipped.value.skipped.message


@pytest.mark.parametrize("cls", KNOWN)
def test_a_choice_without_tensors_takes_prompts_of_any_length(cls):
    assert cls(keep_ratio=0.5).plan(*without(max_num_batched_tokens=16)).kept[-1] == 288


@pytest.mark.parametrize("cls", VISUAL)
def test_layers_off_the_boundaries_are_refused_with_the_legal_ones(cls):
    with pytest.raises(PolicyError, match=r"\[0, 8, 12, 20\], got \[9\]") as refused:
        cls(prune_layers=[8, 9]).plan(PROMPT, ENGINE)
    assert refused.value.param == "pruning.visual.prune_layers"


@pytest.mark.parametrize("cls", VISUAL)
def test_an_engine_without_boundaries_is_refused_with_the_flag(cls):
    with pytest.raises(PolicyError, match="--prune-layers"):
        cls().plan(*without(boundaries=(0,)))


PLAN_EVERYTHING = """
import sys
from tokenprune.lengths import PromptLayout
from tokenprune.policies import methods
from tokenprune.shape import EngineShape
engine = EngineShape(
    32, (0, 8, 12, 20), 4096, allow_channel_pruning=True, head_size=128, block_size=16
)
for axis in ("visual", "kv", "channels"):
    for cls in methods(axis).values():
        cls().plan(PromptLayout(600, ((5, 581),)), engine)
        print(cls.__name__)
heavy = {"torch", "vllm", "triton"} & set(sys.modules)
assert not heavy, heavy
"""


def test_planning_needs_neither_torch_nor_vllm():
    done = subprocess.run(
        [sys.executable, "-c", PLAN_EVERYTHING], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(EVERY)
