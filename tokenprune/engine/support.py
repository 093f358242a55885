"""What an engine cannot do, and why; it is served without these axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenprune.engine.families import family_of, known_architectures
from tokenprune.shape import FEATURES, Feature

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_BIASED_BY_DISTANCE = ("baichuan", "bloom", "falcon", "jais", "mpt")
_PLAIN_CACHE = ("auto", "bfloat16", "float16", "float32", "half")


def unsupported_features(vllm_config: VllmConfig) -> dict[Feature, str]:
    """Return why each feature that this engine lacks cannot be had."""
    engine = _engine_unsupported(vllm_config)
    if engine is not None:
        return dict.fromkeys(FEATURES, f"it runs with {engine}, beside which nothing is pruned yet")
    visual = _visual_unsupported(vllm_config)
    kv = _kv_unsupported(vllm_config)
    found: dict[Feature, str | None] = {
        "visual": visual,
        "importance": visual or _importance_unsupported(vllm_config),
        "kv": kv,
        "channels": kv or _channels_unsupported(vllm_config),
    }
    return {feature: why for feature, why in found.items() if why is not None}


def _engine_unsupported(vllm_config: VllmConfig) -> str | None:
    """Return what about the engine rules out pruning on any axis, or None."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    found = {
        "the V1 model runner": not vllm_config.use_v2_model_runner,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "a KV connector": vllm_config.kv_transfer_config is not None,
        "speculative decoding": vllm_config.speculative_config is not None,
        "MLA attention": model.use_mla,
        "a hybrid model": model.is_hybrid,
        "an attention-free model": model.is_attention_free,
        "an encoder-decoder model": model.is_encoder_decoder,
        "KV sharing fast prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        "micro-batching": parallel.use_ubatching,
    }
    return next((what for what, present in found.items() if present), None)


def _visual_unsupported(vllm_config: VllmConfig) -> str | None:
    """Return why visual tokens cannot be dropped between decoder layers, or None."""
    model = vllm_config.model_config
    if not model.is_multimodal_model:
        return f"{model.architecture} takes no images"
    family = family_of(model.architecture)
    if family is None:
        return f"{model.architecture} is not among {', '.join(known_architectures())}"
    if (reason := family.visual_unsupported(vllm_config)) is not None:
        return reason
    if model.get_sliding_window() is not None:
        return "the decoder has sliding-window attention layers"
    if vllm_config.lora_config is not None:
        return "LoRA adapters are enabled, which map rows to adapters once per step"
    if model.is_mm_prefix_lm:
        return "image tokens attend in both directions"
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        return "KV cache groups are merged (--disable-hybrid-kv-cache-manager)"
    return None


def _importance_unsupported(vllm_config: VllmConfig) -> str | None:
    """Return why images cannot be scored in the vision tower of a supported model, or None."""
    family = family_of(vllm_config.model_config.architecture)
    options = vllm_config.model_config.multimodal_config
    if family is not None and (reason := family.importance_unsupported(vllm_config)) is not None:
        return reason
    if vllm_config.ec_transfer_config is not None:
        return "images are encoded in another engine (EC connector)"
    if options.enable_mm_embeds:
        return "images may arrive as embeddings (--enable-mm-embeds)"
    if options.mm_encoder_tp_mode == "data":
        return "images are spread over the ranks (--mm-encoder-tp-mode data)"
    return None


def _kv_unsupported(vllm_config: VllmConfig) -> str | None:
    """Return why KV tokens cannot be evicted, or None."""
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


def _channels_unsupported(vllm_config: VllmConfig) -> str | None:
    """Return why KV channels cannot be pruned where KV tokens can be evicted, or None."""
    from vllm.utils.torch_utils import get_kv_cache_torch_dtype

    model, dtype = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    if dtype != "auto" and get_kv_cache_torch_dtype(dtype, model.dtype) != model.dtype:
        return f"the KV cache is {dtype}, but queries are {model.dtype}"
    return None
