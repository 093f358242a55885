"""Reads the sizes of engine and model from vLLM's configuration; the same in every process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenprune.engine.boundaries import check_boundaries, default_boundaries
from tokenprune.engine.families import family_of
from tokenprune.engine.settings import settings
from tokenprune.engine.support import unsupported_features
from tokenprune.shape import EngineShape, ModelShape

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# longest prompt that may wait for its rest where nothing else is asked for: at 4096 channels of 16
# bits 256 MiB of rows
DEFAULT_WAITING_TOKENS = 32768


def engine_shape(vllm_config: VllmConfig) -> EngineShape:
    """Return what plans must know of this engine.

    Raises:
        ConfigurationError: The stage boundaries do not fit the model.
    """
    num_layers = vllm_config.model_config.hf_text_config.num_hidden_layers
    unsupported = unsupported_features(vllm_config)
    chosen = settings(vllm_config)
    layers = chosen.prune_layers
    if layers is None:
        layers = () if "visual" in unsupported else default_boundaries(num_layers)
    else:
        check_boundaries(num_layers, layers)
    return EngineShape(
        num_layers,
        (0, *layers),
        _longest_step(vllm_config),
        unsupported,
        max_model_len=vllm_config.model_config.max_model_len,
        max_num_waiting_tokens=_waiting_tokens(vllm_config),
        num_late=_num_late(vllm_config),
        allow_channel_pruning=chosen.allow_channel_pruning,
        head_size=vllm_config.model_config.get_head_size(),
        block_size=vllm_config.cache_config.block_size,
    )


def _waiting_tokens(vllm_config: VllmConfig) -> int:
    """Return the rows of pruned prompts that there is room for until their prompt is complete."""
    asked = settings(vllm_config).max_num_waiting_tokens
    if asked is not None:
        return asked
    return min(vllm_config.model_config.max_model_len, DEFAULT_WAITING_TOKENS)


def _num_late(vllm_config: VllmConfig) -> int:
    family = family_of(vllm_config.model_config.architecture)
    return family.num_late(vllm_config) if family is not None else 0


def _longest_step(vllm_config: VllmConfig) -> int:
    """Return the most tokens of one prompt that one step can hold, by any of vLLM's limits."""
    scheduler = vllm_config.scheduler_config
    limits = [
        scheduler.max_num_batched_tokens,
        scheduler.max_num_scheduled_tokens,
        # a threshold cuts long prefills into chunks
        scheduler.long_prefill_token_threshold,
    ]
    return min(limit for limit in limits if limit)


def _mlp_width(text: Any) -> int:
    """Return the width of what a token passes in a layer: the MLP, or its experts together."""
    experts = getattr(text, "num_experts_per_tok", None)
    width = getattr(text, "moe_intermediate_size", None)
    # some models name these otherwise, or give a width per layer
    if not isinstance(experts, int) or not isinstance(width, int):
        return int(getattr(text, "intermediate_size", 0))
    return experts * width + int(getattr(text, "shared_expert_intermediate_size", None) or 0)


def model_shape(vllm_config: VllmConfig) -> ModelShape:
    """Return the sizes that costs are counted from."""
    from vllm.utils.torch_utils import get_kv_cache_torch_dtype

    model = vllm_config.model_config
    text = model.hf_text_config
    dtype = get_kv_cache_torch_dtype(vllm_config.cache_config.cache_dtype, model.dtype)
    return ModelShape(
        hidden_size=model.get_hidden_size(),
        intermediate_size=_mlp_width(text),
        num_heads=getattr(text, "num_attention_heads", 0),
        num_kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        kv_element_bytes=dtype.itemsize,
    )
