"""Attention metadata per stage: physical lengths in, one build per stage, shared by its groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.utils import AttentionGroup

from tokenprune.engine.kv.channel_packer import ChannelPacker
from tokenprune.engine.kv_cache import StagedAttentionSpec

# backends whose metadata holds both tables and nothing computed from them
_TABLES_ARE_PLAIN = ("CPU_ATTN", "TRITON_ATTN")


@dataclass(frozen=True, slots=True)
class StagedStep:
    """The stage batches of one step that holds pruned requests.

    Attributes:
        source: The runner's batch they were derived from.
        batches: Per stage, the batch with physical lengths (and fewer rows in a pruning step).
    """

    source: InputBatch
    batches: list[InputBatch]


def stage_groups(config: KVCacheConfig) -> list[list[int]]:
    """Return the KV cache groups of each stage; one stage of all groups without ours."""
    stages: dict[int, list[int]] = {}
    for index, group in enumerate(config.kv_cache_groups):
        spec = group.kv_cache_spec
        stages.setdefault(spec.stage if isinstance(spec, StagedAttentionSpec) else 0, []).append(
            index
        )
    return [stages[stage] for stage in sorted(stages)]


class StagedModelState(DefaultModelState):
    """vLLM's model state with physical lengths per stage.

    Attributes:
        step: What the runner computed for the batch at hand, or None when nothing is pruned.
        before_encoder: Called before vLLM encodes the images of a step.
        packer: Prunes channels, or None where that is not allowed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step: StagedStep | None = None
        self.before_encoder: Callable[[], None] = lambda: None
        self.packer: ChannelPacker | None = None
        self._groups: list[list[int]] = [[]]
        self._seq_lens = torch.zeros(0)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, block_tables: Any) -> None:
        """Allocate the persistent lengths; CUDA graphs read them by address."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self._groups = stage_groups(kv_cache_config)
        self._seq_lens = torch.zeros(
            (len(self._groups), self.max_num_reqs), dtype=torch.int32, device=self.device
        )

    def prepare_inputs_embeds(self, *args: Any, **kwargs: Any) -> Tensor:
        """Encode and gather images, those first that are to be scored."""
        self.before_encoder()
        return super().prepare_inputs_embeds(*args, **kwargs)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Sequence[Tensor],
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Build metadata once per stage, or once in all while no lengths differ."""
        step = self.step if self.step is not None and self.step.source is input_batch else None
        full_graph = for_capture or cudagraph_mode == CUDAGraphMode.FULL
        if step is None and not full_graph:
            work = [([g for stage in self._groups for g in stage], input_batch)]
        else:
            batches = step.batches if step else [input_batch] * len(self._groups)
            if full_graph:
                batches = [self._persistent(s, b) for s, b in enumerate(batches)]
                if self.packer is not None:
                    self.packer.persist(input_batch.seq_lens.shape[0])
            work = list(zip(self._groups, batches, strict=True))
        prepare = super().prepare_attn

        def build(batch: InputBatch, group: int) -> dict[str, Any]:
            only = [groups if i == group else [] for i, groups in enumerate(attn_groups)]
            built: dict[str, Any] = prepare(
                batch,
                cudagraph_mode,
                block_tables,
                slot_mappings,
                only,
                kv_cache_config,
                for_capture,
                *args,
                **kwargs,
            )
            return built

        metadata: dict[str, Any] = {}
        for (first, *rest), batch in work:
            built = build(batch, first)
            metadata.update(built)
            for group in rest:
                tables, slots = block_tables[group], slot_mappings[group]
                derived = _derive(built, attn_groups[first], attn_groups[group], tables, slots)
                metadata.update(build(batch, group) if derived is None else derived)
        return metadata

    def _persistent(self, stage: int, batch: InputBatch) -> InputBatch:
        seq_lens = self._seq_lens[stage, : batch.seq_lens.shape[0]]
        seq_lens.copy_(batch.seq_lens)
        return dataclasses.replace(batch, seq_lens=seq_lens)


def _derive(
    built: dict[str, Any],
    source: list[AttentionGroup],
    target: list[AttentionGroup],
    block_table: Tensor,
    slot_mapping: Tensor,
) -> dict[str, Any] | None:
    """Return `built` metadata with another group's tables; None where the backend needs a build."""
    if len(source) != 1 or len(target) != 1 or source[0].backend is not target[0].backend:
        return None
    metadata = built[source[0].layer_names[0]]
    builder = target[0].get_metadata_builder(0)
    if builder.supports_update_block_table:
        derived = builder.update_block_table(metadata, block_table, slot_mapping)
    elif source[0].backend.get_name() in _TABLES_ARE_PLAIN:
        derived = dataclasses.replace(metadata, block_table=block_table, slot_mapping=slot_mapping)
    else:
        return None
    return dict.fromkeys(target[0].layer_names, derived)
