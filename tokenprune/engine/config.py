"""Engine-wide settings, the engine's shape, and the combinations refused at start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenprune.errors import ConfigurationError
from tokenprune.policies import EngineShape
from tokenprune.request import Axes, add_presets, parse_pruning

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONFIG_KEY = "tokenprune"
MAX_KV_GROUPS = 12
_SETTINGS = ("presets", "prune_layers", "default", "allow_channel_pruning")
_LLAVA = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
)
_DECODERS = ("llama", "mistral", "qwen2", "qwen3")
# vision towers that can be scored, and the features that leave out their class token
_TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}
_BIASED_BY_DISTANCE = ("baichuan", "bloom", "falcon", "jais", "mpt")
_PLAIN_CACHE = ("auto", "bfloat16", "float16", "float32", "half")


@dataclass(frozen=True, slots=True)
class Settings:
    """What `--additional-config '{"tokenprune": {...}}'` says.

    Attributes:
        prune_layers: Stage boundaries asked for, or None for the default of the model's depth.
        default_pruning: Applied to requests that say nothing about pruning.
        allow_channel_pruning: Whether requests may prune KV channels; attention then also looks
            for rows with packed blocks.
    """

    prune_layers: tuple[int, ...] | None
    default_pruning: Axes
    allow_channel_pruning: bool = False


def settings(vllm_config: VllmConfig) -> Settings:
    """Read the plugin's settings, and make the presets among them known to this process.

    Raises:
        ConfigurationError: A key is unknown or a value has the wrong type.
        PolicyError: The default pruning or a preset is not legal.
    """
    additional = vllm_config.additional_config
    raw: Any = additional.get(CONFIG_KEY, {}) if isinstance(additional, dict) else {}
    if not isinstance(raw, dict):
        raise ConfigurationError(
            f"{CONFIG_KEY} settings must be an object with {', '.join(_SETTINGS)}, got {raw!r}"
        )
    unknown = set(raw) - set(_SETTINGS)
    if unknown:
        raise ConfigurationError(
            f"{CONFIG_KEY} settings must be among {', '.join(_SETTINGS)}, got {sorted(unknown)}"
        )
    layers = raw.get("prune_layers")
    if layers is not None and not (
        isinstance(layers, list) and all(type(layer) is int for layer in layers)
    ):
        raise ConfigurationError(f"prune_layers must be a list of layer numbers, got {layers!r}")
    allow = raw.get("allow_channel_pruning", False)
    if not isinstance(allow, bool):
        raise ConfigurationError(f"allow_channel_pruning must be true or false, got {allow!r}")
    # every process that reads requests reads the settings first
    add_presets(raw.get("presets", {}))
    boundaries = None if layers is None else tuple(layers)
    return Settings(boundaries, parse_pruning(raw.get("default")), allow)


def engine_shape(vllm_config: VllmConfig) -> EngineShape:
    """Return what plans must know of this engine.

    Raises:
        ConfigurationError: The stage boundaries do not fit the model.
    """
    num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    unsupported = visual_pruning_unsupported(vllm_config)
    chosen = settings(vllm_config)
    asked = chosen.prune_layers
    if asked is not None:
        check_boundaries(num_layers, asked)
        layers = asked
    else:
        layers = () if unsupported else default_boundaries(num_layers)
    scheduler = vllm_config.scheduler_config
    limits = [scheduler.max_num_batched_tokens]
    # a threshold cuts long prefills into chunks, which is what "whole prompt" methods cannot take
    if scheduler.long_prefill_token_threshold > 0:
        limits.append(scheduler.long_prefill_token_threshold)
    return EngineShape(
        num_layers,
        (0, *layers),
        min(limits),
        unsupported,
        kv_unsupported=kv_eviction_unsupported(vllm_config),
        max_model_len=vllm_config.model_config.max_model_len,
        importance_unsupported=unsupported or importance_unsupported(vllm_config),
        allow_channels=chosen.allow_channel_pruning,
        channels_unsupported=channel_pruning_unsupported(vllm_config),
        head_size=vllm_config.model_config.get_head_size(),
        block_size=vllm_config.cache_config.block_size,
    )


def visual_pruning_unsupported(vllm_config: VllmConfig) -> str | None:
    """Return why visual tokens of this model cannot be pruned, or None if they can."""
    model = vllm_config.model_config
    if not model.is_multimodal_model:
        return f"{model.architecture} takes no images"
    if model.uses_mrope:
        return f"{model.architecture} uses M-RoPE positions, which are not supported yet"
    if model.architecture not in _LLAVA:
        return f"{model.architecture} is not among {', '.join(_LLAVA)}"
    decoder = model.hf_text_config.model_type
    if decoder not in _DECODERS:
        return f"decoder type {decoder!r} is not among {', '.join(_DECODERS)}"
    if model.get_sliding_window() is not None:
        return "the decoder has sliding-window attention layers"
    if vllm_config.lora_config is not None:
        return "LoRA adapters are enabled, which map rows to adapters once per step"
    if model.is_mm_prefix_lm:
        return "image tokens attend in both directions"
    return None


def importance_unsupported(vllm_config: VllmConfig) -> str | None:
    """Return why the patches of images cannot be scored in the vision tower, or None."""
    config = vllm_config.model_config.hf_config
    options = vllm_config.model_config.multimodal_config
    tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
    if tower not in _TOWERS:
        return f"vision tower type {tower!r} is not among {', '.join(_TOWERS)}"
    if strategy != _TOWERS[tower]:
        return (
            f"the vision tower's features are selected by {strategy!r} instead of "
            f"{_TOWERS[tower]!r}"
        )
    if not isinstance(config.vision_feature_layer, int):
        return "features are taken from several layers of the vision tower"
    if vllm_config.ec_transfer_config is not None:
        return "images are encoded in another engine (EC connector)"
    if options.enable_mm_embeds:
        return "images may arrive as embeddings (--enable-mm-embeds)"
    if options.mm_encoder_tp_mode == "data":
        return "images are spread over the ranks (--mm-encoder-tp-mode data)"
    return None


def kv_eviction_unsupported(vllm_config: VllmConfig) -> str | None:
    """Return why KV tokens cannot be evicted in this engine, or None if they can."""
    model, dtype = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    text = model.hf_text_config
    layer_types = set(getattr(text, "layer_types", None) or ())
    if model.get_sliding_window() is not None or layer_types - {"full_attention"}:
        return f"{model.architecture} has layers that do not attend to the whole context"
    if getattr(text, "attention_chunk_size", None):
        return f"{model.architecture} attends in chunks of the context"
    if text.model_type in _BIASED_BY_DISTANCE and (
        text.model_type != "falcon" or getattr(text, "alibi", False)
    ):
        return f"{model.architecture} biases attention by the distance of cache indices (ALiBi)"
    if model.is_multimodal_model and model.is_mm_prefix_lm:
        return "image tokens attend in both directions"
    if dtype not in _PLAIN_CACHE:
        return f"the KV cache is quantised ({dtype})"
    return None


def channel_pruning_unsupported(vllm_config: VllmConfig) -> str | None:
    """Return why KV channels cannot be pruned in this engine, or None if they can."""
    model, dtype = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    unsupported = kv_eviction_unsupported(vllm_config)
    if unsupported is None and dtype != "auto":
        from vllm.utils.torch_utils import get_kv_cache_torch_dtype

        if get_kv_cache_torch_dtype(dtype, model.dtype) != model.dtype:
            return f"the KV cache is {dtype}, but queries are {model.dtype}"
    return unsupported


def default_boundaries(num_layers: int) -> tuple[int, ...]:
    """Return boundaries near 1/4, 3/8 and 5/8 of the depth that make few KV cache groups.

    vLLM cuts stages into groups of equal layer count, so boundaries are multiples of a divisor
    of the depth where a suitable one exists.
    """
    divisors = [d for d in range(1, math.ceil(num_layers / 8) + 1) if num_layers % d == 0]
    step = divisors[-1]
    if num_layers // step > MAX_KV_GROUPS:
        step = max(1, round(num_layers / 8))
    layers = {
        step * max(1, math.ceil(num_layers * share / step - 0.5)) for share in (1 / 4, 3 / 8, 5 / 8)
    }
    return tuple(sorted(layer for layer in layers if layer < num_layers))


def num_kv_groups(num_layers: int, layers: tuple[int, ...]) -> int:
    """Return how many KV cache groups vLLM makes of these stages."""
    sizes = EngineShape(num_layers, (0, *layers), 0).stage_sizes()
    largest, smallest = max(sizes), min(sizes)
    # vLLM's own rule: pad to the largest stage where that wastes little
    size = largest if largest < 1.5 * smallest else smallest
    return sum(math.ceil(stage / size) for stage in sizes)


def check_boundaries(num_layers: int, layers: tuple[int, ...]) -> None:
    """Refuse boundaries that are out of range or too costly.

    Raises:
        ConfigurationError: With better boundaries, where the number of groups is the reason.
    """
    if list(layers) != sorted(set(layers)) or any(not 0 < b < num_layers for b in layers):
        raise ConfigurationError(
            f"prune_layers must ascend without repeats within 1..{num_layers - 1}, "
            f"got {list(layers)}"
        )
    groups = num_kv_groups(num_layers, layers)
    if groups > MAX_KV_GROUPS:
        raise ConfigurationError(
            f"prune_layers must make at most {MAX_KV_GROUPS} KV cache groups, got {groups} from "
            f"{list(layers)}; try {list(_near(num_layers, layers))}"
        )


def _near(num_layers: int, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Return legal boundaries close to `layers`, multiples of a divisor of the depth if any."""
    for step in sorted(range(1, num_layers), key=lambda s: (num_layers % s > 0, s)):
        near = {step * max(1, round(layer / step)) for layer in layers}
        rounded = tuple(sorted(layer for layer in near if layer < num_layers))
        if rounded and num_kv_groups(num_layers, rounded) <= MAX_KV_GROUPS:
            return rounded
    return default_boundaries(num_layers)


def check_supported(vllm_config: VllmConfig) -> None:
    """Refuse engine set-ups the plugin cannot serve correctly.

    Raises:
        ConfigurationError: Naming the setting and the reason.
    """
    parallel = vllm_config.parallel_config
    model = vllm_config.model_config
    rows = engine_shape(vllm_config).prune_layers
    refused = {
        "the V1 model runner": not vllm_config.use_v2_model_runner,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "a KV connector": vllm_config.kv_transfer_config is not None,
        "speculative decoding": vllm_config.speculative_config is not None,
        "MLA attention": model.use_mla,
        "a hybrid or attention-free model": model.is_hybrid or model.is_attention_free,
        "an encoder-decoder model": model.is_encoder_decoder,
        "KV sharing fast prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        "micro-batching": bool(parallel.use_ubatching),
        "--disable-hybrid-kv-cache-manager with stage boundaries": bool(rows)
        and bool(vllm_config.scheduler_config.disable_hybrid_kv_cache_manager),
    }
    for what, present in refused.items():
        if present:
            raise ConfigurationError(f"tokenprune does not support {what}; serve with vllm serve")
