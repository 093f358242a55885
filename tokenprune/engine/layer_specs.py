"""Gives the KV spec of every attention layer its stage, and says what the layer's cache can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tokenprune.engine.kv.cache_layout import KNOWN_BACKENDS
from tokenprune.engine.kv_cache import StagedAttentionSpec
from tokenprune.errors import ConfigurationError
from tokenprune.shape import EngineShape


def staged_specs(
    specs: Mapping[str, Any], shape: EngineShape, attention: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the specs with their stages; as they are where a layer cannot have one.

    Args:
        specs: Specs of the layers by name.
        shape: The engine's shape.
        attention: vLLM's attention layers by name.

    Raises:
        ConfigurationError: There are boundaries, and a layer does not have full attention.
    """
    full = all(type(spec) is FullAttentionSpec for spec in specs.values())
    if shape.num_stages == 1 and not full:
        return specs
    evicts = full and all(_evicts(attention[name], spec) for name, spec in specs.items())
    packs = evicts and all(_packs(attention[name]) for name in specs)
    staged = {}
    for name, spec in specs.items():
        if type(spec) is not FullAttentionSpec:
            raise ConfigurationError(
                f"stage boundaries need full attention in every layer, got "
                f"{type(spec).__name__} in {name}; start with --prune-layers none"
            )
        stage = shape.stage_of(extract_layer_index(name))
        staged[name] = StagedAttentionSpec.of(spec, stage, evicts, packs)
    return staged


def _evicts(layer: Any, spec: FullAttentionSpec) -> bool:
    whole = spec.sliding_window is None and spec.attention_chunk_size is None
    return whole and layer.get_attn_backend().get_name() in KNOWN_BACKENDS


def _packs(layer: Any) -> bool:
    capped = getattr(layer.impl, "logits_soft_cap", None)
    return getattr(layer.impl, "sinks", None) is None and not capped
