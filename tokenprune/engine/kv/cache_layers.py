"""The attention layers of a worker with their caches and block tables, in order of their groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import KVCacheConfig

from tokenprune.engine.kv.cache_layout import CacheLayout, layout_of
from tokenprune.errors import ConfigurationError

# elements of keys and values read at once for scoring: 32 MiB of float32
MAX_READ = 1 << 23


@dataclass(frozen=True, slots=True, eq=False)
class CacheLayer:
    """One attention layer.

    Attributes:
        index: Decoder layer, 0-based.
        stage: Stage of the layer.
        group: KV cache group of the layer.
        attention: vLLM's attention layer.
        layout: How rows lie in its cache.
        blocks: `[R, m]` block tables of its group, by request.
    """

    index: int
    stage: int
    group: int
    attention: Any
    layout: CacheLayout
    blocks: Tensor

    @property
    def cache(self) -> Tensor:
        """Its cache, `[B, H, S, 2 * D]`."""
        cache: Tensor = self.attention.kv_cache
        return cache

    @property
    def scale(self) -> float:
        """What its logits are multiplied with."""
        return float(self.attention.impl.scale)


def cache_layers(
    config: KVCacheConfig,
    stages: Sequence[Sequence[int]],
    attention: dict[str, Any],
    block_tables: Any,
) -> list[CacheLayer]:
    """Return the attention layers of a worker.

    Args:
        config: KV cache groups.
        stages: Per stage its groups.
        attention: Attention layers by name.
        block_tables: vLLM's block tables.

    Raises:
        ConfigurationError: Kernels see blocks of another size than the block table's.
    """
    found = []
    for stage, groups in enumerate(stages):
        for group in groups:
            for name in config.kv_cache_groups[group].layer_names:
                layer = attention[name]
                size = layer.kv_cache.shape[2]
                if size != block_tables.block_sizes[group]:
                    raise ConfigurationError(
                        f"blocks of the attention kernel must be those of the block table to "
                        f"evict KV tokens, got {size} and {block_tables.block_sizes[group]}; "
                        f"set --block-size {size}"
                    )
                backend = layer.get_attn_backend().get_name()
                found.append(
                    CacheLayer(
                        index=extract_layer_index(name),
                        stage=stage,
                        group=group,
                        attention=layer,
                        layout=layout_of(backend, layer, layer.kv_cache),
                        blocks=block_tables.block_tables[group].gpu,
                    )
                )
    return found
