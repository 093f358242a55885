"""The `pruning` field: the three forms say the same, and everything else is refused by name."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.errors import PolicyError
from tokenprune.policies import methods
from tokenprune.request import (
    AXES,
    FLAT_PREFIX,
    OFF,
    PRESETS,
    Axes,
    flatten,
    has_flat,
    parse_flat,
    parse_pruning,
)

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)
METHODS = sorted(methods("visual"))


def visual(**parameters):
    return {"visual": {"method": "uniform", **parameters}}


def vflowopt(**parameters):
    return {"visual": {"method": "vflowopt", **parameters}}


# legal values

ratios = st.floats(0, 1, exclude_min=True) | st.just(1)


@st.composite
def legal(draw):
    method = draw(st.sampled_from(METHODS))
    if method == "vflowopt":
        return {"visual": draw(legal_vflowopt())}
    asked = {"method": method}
    layers = draw(st.none() | st.sets(st.integers(0, 99), min_size=1, max_size=4).map(sorted))
    if layers is not None:
        asked["prune_layers"] = layers
    if draw(st.booleans()):
        num = len(layers) if layers else 3
        values = st.lists(ratios, min_size=num, max_size=num)
        asked["keep_ratios"] = draw(values.map(lambda v: sorted(v, reverse=True)))
    elif draw(st.booleans()):
        asked["keep_ratio"] = draw(ratios)
    own = {
        "random": {"seed": st.integers(0, 2**63 - 1)},
        "transprune": {"alpha": st.floats(0, 1), "form": st.sampled_from(["code", "paper"])},
    }
    for key, values in own.get(method, {}).items():
        if draw(st.booleans()):
            asked[key] = draw(values)
    return {"visual": asked}


def legal_vflowopt():
    optional = {
        "stages": st.lists(ratios, min_size=3, max_size=3),
        "prune_layers": st.sets(st.integers(1, 99), min_size=2, max_size=2).map(sorted),
        "threshold": st.floats(0, 100),
        "cell": st.floats(1, 50) | st.integers(1, 50),
        "alpha": st.floats(-2, 2),
    }
    return st.fixed_dictionaries({"method": st.just("vflowopt")}, optional=optional)


@PROPERTY
@given(legal())
def test_nested_and_flat_forms_say_the_same(value):
    parsed = parse_pruning(value)
    for key, asked in value["visual"].items():
        assert getattr(parsed.policy("visual"), key) == asked
    flat = flatten(parsed)
    # what was not asked for is left to the server's own defaults
    assert set(flat) == {f"{FLAT_PREFIX}visual_{key}" for key in value["visual"]}
    assert parse_flat(flat) == parsed
    assert parse_flat({**flat, "top_k": 5, "other_pruning_key": 1}) == parsed
    assert has_flat(flat)


@PROPERTY
@given(legal())
def test_flat_values_are_scalars_and_lists_of_scalars(value):
    # the only values that vllm_xargs take
    for flat in flatten(parse_pruning(value)).values():
        for scalar in flat if isinstance(flat, list) else [flat]:
            assert type(scalar) in (str, int, float)


@PROPERTY
@given(legal())
def test_a_parsed_field_is_returned_as_it_is(value):
    parsed = parse_pruning(value)
    assert parse_pruning(parsed) is parsed


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_legal_in_every_form(name):
    parsed = parse_pruning(name)
    assert parsed == parse_pruning(PRESETS[name])
    assert parse_flat({"pruning": name}) == parsed
    assert parse_flat(flatten(parsed)) == parsed
    assert parsed.is_off == (name == "off")


def test_presets_keep_less_from_safe_to_aggressive():
    kept = [
        parse_pruning(name).policy("visual").keep_ratio
        for name in ("safe", "balanced", "aggressive")
    ]
    assert kept == sorted(set(kept), reverse=True)


@pytest.mark.parametrize("value", [None, "off", {}, {"visual": None}, OFF])
def test_forms_of_off(value):
    parsed = parse_pruning(value)
    assert parsed.is_off
    assert all(parsed.policy(axis) is None for axis in AXES)
    assert flatten(parsed) == {"pruning": "off"}


@pytest.mark.parametrize(
    ("extra_args", "expected"),
    [
        pytest.param(None, False, id="none"),
        pytest.param({}, False, id="empty"),
        pytest.param(
            {"other": 1, "spruning_x": 1, "prunings": 1, "Pruning": 1}, False, id="others"
        ),
        pytest.param({"pruning": "off"}, True, id="preset"),
        pytest.param({"pruning_visual_method": "uniform"}, True, id="flat"),
        pytest.param({"pruning_typo": 1}, True, id="unknown-key-of-ours"),
    ],
)
def test_has_flat_sees_only_our_keys(extra_args, expected):
    assert has_flat(extra_args) is expected
    if not expected:
        assert parse_flat(extra_args).is_off


def test_a_field_is_immutable():
    with pytest.raises(ValueError, match="frozen"):
        parse_pruning("safe").visual = None


# illegal values: the message names the key and what is legal

IN_0_1 = r"must be a number in \(0, 1\], got "
KNOWN = ", ".join(METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "ratio",
    [
        0,
        0.0,
        -0.5,
        -1,
        1.0000001,
        2,
        math.nan,
        math.inf,
        -math.inf,
        True,
        False,
        "0.5",
        None,
        [0.5],
        {},
    ],
)
def test_keep_ratio_outside_its_interval_or_of_another_type(method, ratio):
    with pytest.raises(PolicyError, match=r"^pruning\.visual\.keep_ratio " + IN_0_1) as refused:
        parse_pruning({"visual": {"method": method, "keep_ratio": ratio}})
    assert refused.value.param == "pruning.visual.keep_ratio"
    assert str(refused.value).endswith(repr(ratio))


@pytest.mark.parametrize(
    ("value", "param", "message"),
    [
        pytest.param("fast", "pruning", "off, safe, balanced, aggressive", id="unknown-preset"),
        pytest.param("", "pruning", "off, safe, balanced, aggressive", id="empty-preset"),
        pytest.param(3, "pruning", "off, safe, balanced, aggressive", id="number"),
        pytest.param(True, "pruning", "off, safe, balanced, aggressive", id="true"),
        pytest.param(False, "pruning", "off, safe, balanced, aggressive", id="false"),
        pytest.param(["safe"], "pruning", "off, safe, balanced, aggressive", id="list"),
        pytest.param(
            {"vision": {}}, "pruning.vision", "known keys: channels, kv, visual", id="unknown-axis"
        ),
        pytest.param({"visual": "uniform"}, "pruning.visual", "uniform", id="method-for-axis"),
        pytest.param({"visual": []}, "pruning.visual", "uniform", id="list-for-axis"),
        pytest.param({"visual": 5}, "pruning.visual", "uniform", id="number-for-axis"),
        pytest.param({"visual": True}, "pruning.visual", "uniform", id="bool-for-axis"),
        pytest.param({"visual": {}}, "pruning.visual.method", KNOWN, id="no-method"),
        pytest.param(
            {"visual": {"keep_ratio": 0.5}}, "pruning.visual.method", KNOWN, id="ratio-only"
        ),
        *(
            pytest.param(visual(method=m), "pruning.visual.method", KNOWN, id=f"method-{m!r}")
            for m in ("fastv", "", "Uniform", 5, None, True, [], {}, ["uniform"])
        ),
        pytest.param(
            visual(ratio=0.5),
            "pruning.visual.ratio",
            "known keys: keep_ratio, keep_ratios, method, prune_layers",
            id="unknown-key",
        ),
        pytest.param(visual(alpha=0.5), "pruning.visual.alpha", "keep_ratios", id="others-key"),
        pytest.param(visual(axis="kv"), "pruning.visual.axis", "known keys", id="class-attribute"),
        pytest.param(
            visual(keep_ratio=0.5, keep_ratios=[0.5, 0.4, 0.3]),
            "pruning.visual.keep_ratio",
            "keep_ratios exclude each other",
            id="ratio-and-ratios",
        ),
        pytest.param(
            visual(keep_ratios=[0.2, 0.5, 0.1]),
            "pruning.visual.keep_ratios",
            "must not increase",
            id="increasing",
        ),
        pytest.param(
            visual(keep_ratios=[0.5, 0.2]), "pruning.visual.keep_ratios", "3 values", id="too-few"
        ),
        pytest.param(
            visual(keep_ratios=[0.5, 0.2], prune_layers=[1]),
            "pruning.visual.keep_ratios",
            "1 values",
            id="more-ratios-than-layers",
        ),
        pytest.param(
            visual(keep_ratios=[0.5, 0.2, 0]),
            "pruning.visual.keep_ratios",
            r"in \(0, 1\]",
            id="zero-among-ratios",
        ),
        pytest.param(
            visual(keep_ratios=[1.5, 0.2, 0.1]),
            "pruning.visual.keep_ratios",
            r"in \(0, 1\]",
            id="above-one-among-ratios",
        ),
        pytest.param(
            visual(keep_ratios=[math.nan] * 3),
            "pruning.visual.keep_ratios.0",
            "finite",
            id="nan-among-ratios",
        ),
        pytest.param(
            visual(keep_ratios=[0.5, True, 0.1]),
            "pruning.visual.keep_ratios.1",
            "number",
            id="bool-among-ratios",
        ),
        pytest.param(visual(keep_ratios=[]), "pruning.visual.keep_ratios", "at least 1", id="none"),
        pytest.param(
            vflowopt(stages=[0.5, 0.5]),
            "pruning.visual.stages",
            r"must be three shares in \(0, 1\], got \[0.5, 0.5\]",
            id="two-stages",
        ),
        pytest.param(
            vflowopt(stages=[0.5, 0.5, 0]),
            "pruning.visual.stages",
            r"must be three shares in \(0, 1\]",
            id="empty-stage",
        ),
        pytest.param(
            vflowopt(stages=[0.5, 0.5, 0.5], keep_ratio=0.5),
            "pruning.visual.stages",
            "stages and keep_ratio exclude each other",
            id="stages-and-ratio",
        ),
        pytest.param(
            vflowopt(prune_layers=[0, 8]),
            "pruning.visual.prune_layers",
            r"two layers after the first, got \[0, 8\]",
            id="first-layer-twice",
        ),
        pytest.param(
            vflowopt(prune_layers=[8]),
            "pruning.visual.prune_layers",
            "two layers after the first",
            id="one-later-cut",
        ),
        pytest.param(
            vflowopt(cell=0.99), "pruning.visual.cell", r"a number in \[1, 65536\]", id="small-cell"
        ),
        pytest.param(
            vflowopt(threshold=-1),
            "pruning.visual.threshold",
            r"a number in \[0, 65536\], got -1",
            id="negative-threshold",
        ),
        pytest.param(visual(keep_ratios=0.5), "pruning.visual.keep_ratios", "list", id="no-list"),
        pytest.param(
            visual(prune_layers=[12, 8]), "pruning.visual.prune_layers", "ascend", id="unsorted"
        ),
        pytest.param(
            visual(prune_layers=[8, 8]), "pruning.visual.prune_layers", "ascend", id="repeated"
        ),
        pytest.param(
            visual(prune_layers=[]), "pruning.visual.prune_layers", "at least 1", id="no-layers"
        ),
        pytest.param(visual(prune_layers=8), "pruning.visual.prune_layers", "list", id="one-layer"),
        pytest.param(
            visual(prune_layers=["8"]),
            "pruning.visual.prune_layers.0",
            "integer",
            id="string-among-layers",
        ),
        pytest.param(
            visual(prune_layers=[1, True]),
            "pruning.visual.prune_layers.1",
            "integer",
            id="bool-among-layers",
        ),
        pytest.param(
            visual(prune_layers=[8.0]),
            "pruning.visual.prune_layers.0",
            "integer",
            id="float-among-layers",
        ),
        pytest.param(
            visual(method="transprune", alpha=1.5),
            "pruning.visual.alpha",
            r"in \[0, 1\]",
            id="alpha",
        ),
        pytest.param(
            visual(method="transprune", form="both"),
            "pruning.visual.form",
            "'code' or 'paper'",
            id="form",
        ),
        pytest.param(
            visual(method="random", seed=-1),
            "pruning.visual.seed",
            r"an integer in \[0, 9223372036854775807\], got -1",
            id="seed",
        ),
        pytest.param(
            {"visual": {"method": "uniform", 1: 2}},
            "pruning.visual.1",
            "string",
            id="key-that-is-no-string",
        ),
        pytest.param(
            visual(keep_ratio={"a": [{"b": None}]}),
            "pruning.visual.keep_ratio",
            IN_0_1,
            id="nested-junk",
        ),
    ],
)
def test_an_illegal_value_is_refused_by_its_key(value, param, message):
    with pytest.raises(PolicyError, match=message) as refused:
        parse_pruning(value)
    assert refused.value.param == param
    assert str(refused.value).startswith(param)
    # one sentence without pydantic's own words
    assert "\n" not in str(refused.value)
    assert "Input should" not in str(refused.value)


@pytest.mark.parametrize("value", [False, True])
def test_a_flat_bool_may_have_become_a_number(value):
    flat = {"pruning_channels_method": "think", "pruning_channels_pack_generated": int(value)}
    assert parse_flat(flat).policy("channels").pack_generated is value
    # the numbers of other parameters stay what they are, and other numbers are no bool
    assert type(parse_flat({"pruning_kv_method": "lagkv", "pruning_kv_sink": 1}).kv.sink) is int
    for wrong in (2, 0.0, "false"):
        with pytest.raises(PolicyError, match="pack_generated"):
            parse_flat(flat | {"pruning_channels_pack_generated": wrong})


@pytest.mark.parametrize(
    ("flat", "param", "message"),
    [
        pytest.param({"pruning": "fast"}, "pruning", "balanced", id="unknown-preset"),
        pytest.param(
            {"pruning": "safe", "pruning_visual_method": "uniform"},
            "pruning",
            "pruning_visual_method exclude each other",
            id="preset-and-key",
        ),
        pytest.param(
            {"pruning_visual": "uniform"}, "pruning_visual", "pruning_<axis>_<key>", id="no-key"
        ),
        pytest.param({"pruning_": 1}, "pruning_", "pruning_<axis>_<key>", id="bare-prefix"),
        pytest.param({"pruning__x": 1}, "pruning__x", "pruning_<axis>_<key>", id="no-axis"),
        pytest.param({"pruning_vision_method": "x"}, "pruning_vision", "visual", id="unknown-axis"),
        pytest.param(
            {"pruning_visual_keep_ratio": 0.5}, "pruning_visual_method", KNOWN, id="no-method"
        ),
        pytest.param(
            {"pruning_visual_method": "uniform", "pruning_visual_ratio": 0.5},
            "pruning_visual_ratio",
            "keep_ratio",
            id="unknown-key",
        ),
        pytest.param(
            {"pruning_visual_method": "uniform", "pruning_visual_keep_ratio": "0.5"},
            "pruning_visual_keep_ratio",
            IN_0_1,
            id="string-for-number",
        ),
    ],
)
def test_an_illegal_flat_key_is_refused_by_name(flat, param, message):
    with pytest.raises(PolicyError, match=message) as refused:
        parse_flat({"temperature": 1, **flat})
    assert refused.value.param == param


# anything at all: parsed or refused, never another exception

NAMES = [
    "method", "keep_ratio", "keep_ratios", "prune_layers", "alpha", "form", "seed", "visual", "kv",
    "channels", "uniform", "random", "transprune", "off", "safe", "code", "paper",
]  # fmt: skip
names = st.sampled_from(NAMES) | st.text(max_size=4)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | names
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)
likely = st.fixed_dictionaries(
    {"method": st.sampled_from(METHODS)},
    optional={
        "keep_ratio": junk,
        "keep_ratios": st.lists(st.floats() | junk, max_size=4) | junk,
        "prune_layers": st.lists(st.integers() | junk, max_size=4) | junk,
        "alpha": junk,
        "form": junk,
        "seed": junk,
    },
)


def parsed_or_refused(parse, value):
    try:
        outcome = parse(value)
    except PolicyError as error:
        outcome = error
    if isinstance(outcome, PolicyError):
        assert outcome.param.startswith("pruning")
        assert str(outcome)
    else:
        assert isinstance(outcome, Axes)


@settings(PROPERTY, max_examples=400)
@given(junk | st.fixed_dictionaries({"visual": likely | junk}))
def test_any_value_is_parsed_or_refused(value):
    parsed_or_refused(parse_pruning, value)


flat_keys = (
    st.sampled_from([f"pruning_visual_{n}" for n in NAMES] + ["pruning", "pruning_", "pruning__"])
    | names
    | st.text(max_size=6).map("pruning_".__add__)
)


@settings(PROPERTY, max_examples=400)
@given(
    st.dictionaries(flat_keys, junk, max_size=5)
    | likely.map(lambda d: {f"pruning_visual_{k}": v for k, v in d.items()})
)
def test_any_extra_args_are_parsed_or_refused(extra_args):
    parsed_or_refused(parse_flat, extra_args)
