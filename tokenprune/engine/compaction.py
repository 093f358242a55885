"""Evicts KV tokens of live requests: after a step's forward pass, kept rows move to the front.

Runs on the stream of the step, before the next one, so whatever the next step writes into blocks
that were emptied comes later. Which partitions are due follows from the plan and the step's token
counts; which tokens of them stay is the policy's choice, made from the cache itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import KVCacheConfig

from tokenprune.engine.cache_layout import CacheLayout, layout_of
from tokenprune.engine.stats import WorkerStats
from tokenprune.engine.step import Due, PrunedRequest, due
from tokenprune.errors import ConfigurationError
from tokenprune.figures import Op
from tokenprune.policies import KVPolicy, PartitionInputs

# elements of keys and values read at once for scoring: 32 MiB of float32
MAX_READ = 1 << 23


class Compactor:
    """Evicts in the caches of one worker.

    Attributes:
        layouts: How rows lie in the cache of each layer.

    Args:
        config: KV cache groups.
        stages: Per stage its groups.
        layers: Attention layers by name.
        block_tables: vLLM's block tables.
        stats: Where operations are timed.
    """

    def __init__(
        self,
        config: KVCacheConfig,
        stages: Sequence[Sequence[int]],
        layers: dict[str, Any],
        block_tables: Any,
        stats: WorkerStats,
    ) -> None:
        self._stages = stages
        self._block_tables = block_tables
        self._stats = stats
        self._names = [group.layer_names for group in config.kv_cache_groups]
        self._layers = layers
        self.layouts: dict[str, CacheLayout] = {}
        for group, names in enumerate(self._names):
            for name in names:
                cache = layers[name].kv_cache
                if cache.shape[2] != block_tables.block_sizes[group]:
                    raise ConfigurationError(
                        f"blocks of the attention kernel must be those of the block table to "
                        f"evict KV tokens, got {cache.shape[2]} and "
                        f"{block_tables.block_sizes[group]}; set --block-size {cache.shape[2]}"
                    )
                backend = layers[name].get_attn_backend().get_name()
                self.layouts[name] = layout_of(backend, layers[name], cache)

    def evict(self, request: PrunedRequest, index: int, before: int, after: int) -> None:
        """Evict what is due of one request after a step.

        Args:
            request: The request.
            index: Its row in the block tables.
            before: Tokens computed before the step.
            after: Tokens computed after it.
        """
        policy = request.plan.pruning.policy("kv")
        assert isinstance(policy, KVPolicy)
        for stage, groups in enumerate(self._stages):
            work = due(request, before, after, stage)
            if work is None:
                continue
            for group in groups:
                blocks = self._block_tables.block_tables[group].gpu[index]
                for name in self._names[group]:
                    self._evict_layer(policy, work, name, blocks)

    def _evict_layer(self, policy: KVPolicy, work: Due, name: str, blocks: Tensor) -> None:
        layout, cache = self.layouts[name], self._layers[name].kv_cache
        if policy.keeps_newest:
            begin = work.begin - work.first * work.keep
            rest = begin + work.evicted
        else:
            self._cut_down(policy, work, name, blocks)
            begin = work.begin + work.count * work.keep
            rest = work.begin + work.count * work.lag
        with self._stats.time(Op.KV_COMPACT):
            newest = torch.arange(rest, work.end, device=cache.device)[None]
            layout.move(cache, blocks, newest, begin)

    def _cut_down(self, policy: KVPolicy, work: Due, name: str, blocks: Tensor) -> None:
        layout, cache = self.layouts[name], self._layers[name].kv_cache
        heads, width = cache.shape[1], cache.shape[3]
        lag, keep = work.lag, work.keep
        at_once = max(1, MAX_READ // (heads * width * lag) - 1)
        for done in range(0, work.count, at_once):
            count = min(at_once, work.count - done)
            raw = work.begin + done * lag
            with self._stats.time(Op.KV_SELECT):
                keys, values = None, None
                if policy.reads_cache:
                    # the partition behind the last one is its reference
                    keys, values = layout.read(cache, blocks, raw, raw + (count + 1) * lag)
                kept = policy.select(
                    PartitionInputs(
                        num_partitions=count,
                        first=work.first + done,
                        lag=lag,
                        keep=keep,
                        layer=extract_layer_index(name),
                        num_heads=heads,
                        keys=keys,
                        values=values,
                        device=cache.device,
                    )
                )
            with self._stats.time(Op.KV_COMPACT):
                offsets = torch.arange(raw, raw + count * lag, lag, device=cache.device)
                source = (kept + offsets[:, None]).flatten(1)
                layout.move(cache, blocks, source, work.begin + done * keep)
