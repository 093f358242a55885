"""Engine set-ups that are refused at start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenprune.engine.shape import engine_shape
from tokenprune.errors import ConfigurationError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


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
