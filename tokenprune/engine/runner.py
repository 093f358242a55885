"""The model runner: stages in the KV spec, physical slots, pruning steps outside CUDA graphs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from tokenprune.engine.cache_layout import KNOWN_BACKENDS
from tokenprune.engine.channels import ChannelPruner
from tokenprune.engine.compaction import Compactor
from tokenprune.engine.config import engine_shape, settings
from tokenprune.engine.importance import ImageScorer, ScoredEncoderCache
from tokenprune.engine.kv_cache import StagedAttentionSpec, shape_of_cache
from tokenprune.engine.model_state import StagedModelState, StagedStep, stage_groups
from tokenprune.engine.prompts import plan_request, prompt_layout, visual_ranges
from tokenprune.engine.scheduler import CHECKSUM
from tokenprune.engine.staged_prefill import StagedPrefill
from tokenprune.engine.stats import WorkerStats
from tokenprune.engine.step import PrunedRequest, StageRows, stage_rows
from tokenprune.errors import ConfigurationError, DivergenceError


class PruningModelRunner(GPUModelRunner):
    """vLLM's V2 model runner with physical lengths per stage."""

    model_state: StagedModelState

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shape = engine_shape(self.vllm_config)
        self._settings = settings(self.vllm_config)
        if self._shape.importance_unsupported is None:
            self.encoder_cache = ScoredEncoderCache()
        self._staged: StagedPrefill | None = None
        self._pruning_step = False
        # the step runs code of ours between layers that no CUDA graph may skip
        self._needs_no_graph = False
        self._channels: ChannelPruner | None = None
        self._compactor: Compactor | None = None
        self.stats = WorkerStats(self.device, self._shape.num_layers)
        # rows are vLLM's request indices; a row is None, or zero, for a request that is not pruned
        self._pruned: list[PrunedRequest | None] = [None] * self.max_num_reqs
        self._is_pruned = np.zeros(self.max_num_reqs, dtype=bool)
        # how far the cache index lies behind the position in a step without pruning
        self._behind = np.zeros((len(self._shape.boundaries), self.max_num_reqs), dtype=np.int32)
        self._behind_on_device = torch.from_numpy(self._behind.copy()).to(self.device)

    def get_kv_cache_spec(self) -> Any:
        """Give every layer's spec its stage."""
        specs = super().get_kv_cache_spec()
        boundaries = self._shape.boundaries
        full = all(type(spec) is FullAttentionSpec for spec in specs.values())
        if len(boundaries) == 1 and not full:
            return specs
        evicts = full and all(self._evicts(name, spec) for name, spec in specs.items())
        packs = evicts and all(self._packs(name) for name in specs)
        staged = {}
        for name, spec in specs.items():
            if type(spec) is not FullAttentionSpec:
                raise ConfigurationError(
                    f"stage boundaries need full attention in every layer, got "
                    f'{type(spec).__name__} in {name}; start with --prune-layers ""'
                )
            stage = np.searchsorted(boundaries, extract_layer_index(name), side="right") - 1
            staged[name] = StagedAttentionSpec.of(spec, int(stage), evicts, packs)
        return staged

    def _evicts(self, name: str, spec: FullAttentionSpec) -> bool:
        layer = self._attention_layers[name]
        whole = spec.sliding_window is None and spec.attention_chunk_size is None
        return whole and layer.get_attn_backend().get_name() in KNOWN_BACKENDS

    def _packs(self, name: str) -> bool:
        impl = self._attention_layers[name].impl
        capped = getattr(impl, "logits_soft_cap", None)
        return getattr(impl, "sinks", None) is None and not capped

    @property
    def _attention_layers(self) -> dict[str, Any]:
        return self.vllm_config.compilation_config.static_forward_context

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then take its state and hook its layers."""
        super().load_model(*args, **kwargs)
        if type(self.model_state) is not DefaultModelState:
            raise ConfigurationError(
                f"tokenprune needs vLLM's default model state, got "
                f"{type(self.model_state).__name__}; serve this model with vllm serve"
            )
        self.model_state = StagedModelState(
            self.vllm_config, self.model, self.encoder_cache, self.device
        )
        scorer = None
        if isinstance(self.encoder_cache, ScoredEncoderCache):
            scorer = ImageScorer(
                self.vllm_config, self.model, self.encoder_cache, self.device, self.stats
            )
        if self._shape.unsupported is None:
            self._staged = StagedPrefill(self.model, self._shape, self.device, self.stats, scorer)
            self.model_state.before_encoder = self._staged.score_images

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Initialise, then let pruning steps bypass CUDA graphs."""
        super().initialize_kv_cache(*args, **kwargs)
        self._groups = stage_groups(self.kv_cache_config)
        self._slots_of_stage = torch.empty_like(self.block_tables.slot_mappings)
        specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
        self._shape = shape_of_cache(self._shape, specs)
        if all(isinstance(spec, StagedAttentionSpec) and spec.evicts for spec in specs):
            self._compactor = Compactor(
                self.kv_cache_config,
                self._groups,
                self._attention_layers,
                self.block_tables,
                self.stats,
            )
            if self._shape.allow_channels and self._shape.channels_unsupported is None:
                self._prune_channels(self._compactor)
        dispatch = self.cudagraph_manager.dispatch

        @functools.wraps(dispatch)
        def eager_when_pruning(num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
            descriptor = dispatch(num_reqs, num_tokens, *args, **kwargs)
            if not (self._pruning_step or self._needs_no_graph):
                return descriptor
            return BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.NONE,
                num_tokens=num_tokens,
                num_reqs=num_reqs,
                num_active_loras=descriptor.num_active_loras,
            )

        self.cudagraph_manager.dispatch = eager_when_pruning

    def _prune_channels(self, compactor: Compactor) -> None:
        groups = self.kv_cache_config.kv_cache_groups
        self._channels = ChannelPruner(
            compactor,
            [[(g, groups[g].layer_names) for g in stage] for stage in self._groups],
            self.block_tables,
            self._attention_layers,
            self.max_num_reqs,
            self.stats,
        )
        self.model_state.channels = self._channels

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Take over new requests; the scheduler says which of them are pruned."""
        super().add_requests(scheduler_output)
        checksum = getattr(scheduler_output, CHECKSUM, {})
        for new in scheduler_output.scheduled_new_reqs:
            if new.req_id not in checksum:
                continue
            layout = prompt_layout(new.prompt_len, visual_ranges(new.mm_features))
            plan = plan_request(new.sampling_params, layout, self._shape, self._settings)
            if plan.lengths is None:
                raise DivergenceError(f"the worker would not prune request {new.req_id}")
            request = PrunedRequest(new.req_id, layout, plan)
            index = self.req_states.req_id_to_index[new.req_id]
            self._pruned[index] = request
            self._is_pruned[index] = True
            if plan.visual is not None:
                self._behind[:, index] = request.dropped_once_complete()
            self._behind_on_device[:, index] = torch.from_numpy(self._behind[:, index]).to(
                self.device
            )

    def _remove_request(self, req_id: str) -> bool:
        index = self.req_states.req_id_to_index.get(req_id)
        if index is not None and self._is_pruned[index]:
            self._pruned[index] = None
            self._is_pruned[index] = False
            if self._channels is not None:
                self._channels.forget(index)
            self._behind[:, index] = 0
            self._behind_on_device[:, index] = 0
        return super()._remove_request(req_id)

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Run a step; outside CUDA graphs and compiled code if it prunes."""
        try:
            output = super().execute_model(scheduler_output, *args, **kwargs)
            self._shrink(scheduler_output)
            return output
        finally:
            self._pruning_step = self._needs_no_graph = False
            if self._channels is not None:
                self._channels.end_step()
            if self._staged is not None:
                self._staged.disarm()

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Drop emptied blocks, update, then check that the scheduler counts as we do."""
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            index = self.req_states.req_id_to_index[request_id]
            request = self._pruned[index]
            if request is not None and request.shrinks:
                self._drop_blocks(request, index, computed)
        super().update_requests(scheduler_output)
        moved = False
        for request_id, expected in getattr(scheduler_output, CHECKSUM, {}).items():
            index = self.req_states.req_id_to_index[request_id]
            before = int(self.req_states.num_computed_tokens_np[index])
            after = before + scheduler_output.num_scheduled_tokens[request_id]
            request = self._pruned[index]
            found = None
            if request is not None:
                blocks = tuple(self.block_tables.num_blocks.np[:, index].tolist())
                found = (after, request.physical(after), blocks)
            if request is None or found != expected:
                raise DivergenceError(
                    f"request {request_id}: the scheduler counts {expected}, the worker {found}"
                )
            if request.plan.channels is not None and (
                before < request.layout.num_tokens or after > before + 1
            ):
                # its queries are looked at, or it has more rows than a graph has room for
                self._needs_no_graph = True
            if request.drops_rows(before):
                self._pruning_step = True
            elif request.shrinks:
                behind = request.behind(before)
                if (self._behind[:, index] != behind).any():
                    self._behind[:, index] = behind
                    moved = True
        if moved:
            async_tensor_h2d(self._behind, out=self._behind_on_device)

    def _drop_blocks(self, request: PrunedRequest, index: int, computed: int) -> None:
        num_blocks = self.block_tables.num_blocks.np
        freed = 0
        for stage, held in enumerate(request.physical(computed)):
            for group in self._groups[stage]:
                needed = -(-held // self.block_tables.block_sizes[group])
                freed += max(0, int(num_blocks[group, index]) - needed)
                num_blocks[group, index] = min(num_blocks[group, index], needed)
        if freed:
            self.stats.count_freed(request.freeing_method, freed)

    def _shrink(self, scheduler_output: SchedulerOutput) -> None:
        for request_id in getattr(scheduler_output, CHECKSUM, {}):
            index = self.req_states.req_id_to_index[request_id]
            request = self._pruned[index]
            if request is None or not request.shrinks:
                continue
            before = int(self.req_states.num_computed_tokens_np[index])
            after = before + scheduler_output.num_scheduled_tokens[request_id]
            if request.plan.kv is not None:
                assert self._compactor is not None, "the scheduler must not plan what we cannot do"
                self._compactor.evict(request, index, before, after)
                self._count_kv(request, before, after)
            if request.plan.channels is not None:
                assert self._channels is not None, "the scheduler must not plan what we cannot do"
                self._channels.finish(request, index, before, after)

    def _count_kv(self, request: PrunedRequest, before: int, after: int) -> None:
        lengths = request.plan.lengths
        assert lengths is not None
        written = evicted = 0
        for stage, size in enumerate(self._shape.stage_sizes()):
            grown = lengths.entered(after, stage) - lengths.entered(before, stage)
            written += size * grown
            evicted += size * (lengths.held(before, stage) + grown - lengths.held(after, stage))
        self.stats.count_kv(request.kv_method, written, evicted)

    def prepare_attn(self, input_batch: InputBatch) -> tuple[tuple[Tensor, ...], Any]:
        """Compute block tables and slots, by physical length where requests are pruned."""
        self.model_state.step = None
        indices = input_batch.idx_mapping_np
        if not self._is_pruned[indices].any():
            return super().prepare_attn(input_batch)
        block_tables = self.block_tables.gather_block_tables(
            input_batch.idx_mapping, num_reqs_padded=input_batch.num_reqs_after_padding
        )
        if self._pruning_step:
            return block_tables, self._pruning_slots(input_batch)
        return block_tables, self._shifted_slots(input_batch)

    def _shifted_slots(self, batch: InputBatch) -> Tensor:
        """All stages have the same rows; only cache indices lie behind positions."""
        behind_np = self._behind[:, batch.idx_mapping_np]
        behind = self._behind_on_device[:, batch.idx_mapping]
        num_reqs, num_tokens = batch.num_reqs, batch.num_tokens
        of_token = behind
        if num_tokens != num_reqs:
            counts = torch.from_numpy(batch.num_scheduled_tokens).to(self.device)
            of_token = behind.repeat_interleave(counts, dim=1, output_size=num_tokens)
        own_rows = self._begin_channels(batch, [batch.query_start_loc_np] * len(self._groups))
        batches = []
        for stage in range(len(self._groups)):
            indices = batch.positions[:num_tokens] - of_token[stage]
            self._fill_slots(stage, batch, batch.query_start_loc, indices)
            seq_lens = batch.seq_lens.clone()
            seq_lens[:num_reqs] -= behind[stage]
            upper = batch.seq_lens_cpu_upper_bound.clone()
            upper[:num_reqs] -= torch.from_numpy(behind_np[stage])
            if own_rows is not None:
                # what vLLM makes of a row with packed blocks is overwritten
                upper[:num_reqs].clamp_(max=torch.from_numpy(own_rows[stage]))
                limit = async_tensor_h2d(own_rows[stage], device=self.device)
                seq_lens[:num_reqs].clamp_(max=limit)
            batches.append(
                dataclasses.replace(batch, seq_lens=seq_lens, seq_lens_cpu_upper_bound=upper)
            )
        self.model_state.step = StagedStep(batch, batches)
        return self.block_tables.slot_mappings[:, : batch.num_tokens_after_padding]

    def _begin_channels(self, batch: InputBatch, starts: list[np.ndarray]) -> np.ndarray | None:
        """Begin a step of the channel pruner.

        Returns:
            `[stages, num_reqs]` int32 limit of what vLLM's attention reads, which is the row's
            own tokens where it has packed blocks; None if no row has.
        """
        if self._channels is None:
            return None
        requests = [self._pruned[i] for i in batch.idx_mapping_np]
        computed, scheduled = batch.num_computed_tokens_np, batch.num_scheduled_tokens
        self._channels.begin_step(requests, batch.idx_mapping_np, computed, starts, scheduled)
        limits = np.full((len(starts), len(requests)), np.iinfo(np.int32).max, dtype=np.int32)
        for i, request in enumerate(requests):
            if request is not None and request.plan.channels is not None:
                packed = np.array(request.packed_blocks(int(computed[i]))) > 0
                limits[packed, i] = scheduled[i]
        return limits if (limits != np.iinfo(np.int32).max).any() else None

    def _pruning_slots(self, batch: InputBatch) -> list[Tensor]:
        """Later stages have fewer rows; arm the hooks that drop the others."""
        requests = [self._pruned[i] for i in batch.idx_mapping_np]
        computed, scheduled = batch.num_computed_tokens_np, batch.num_scheduled_tokens
        stages = stage_rows(requests, computed, scheduled, len(self._groups))
        self._begin_channels(batch, [rows.starts for rows in stages])
        slots: list[Tensor] = [batch.positions] * len(self.kv_cache_config.kv_cache_groups)
        batches = []
        for stage, rows in enumerate(stages):
            stage_batch = self._stage_batch(batch, rows)
            indices = torch.from_numpy(rows.cache_indices()).to(self.device)
            self._fill_slots(stage, batch, stage_batch.query_start_loc, indices)
            for group in self._groups[stage]:
                view = self.block_tables.slot_mappings[group, : rows.num_rows]
                if len(rows.idle):
                    view[torch.from_numpy(rows.idle.astype(np.int64))] = PAD_SLOT_ID
                slots[group] = view
            batches.append(stage_batch)
        self.model_state.step = StagedStep(batch, batches)
        assert self._staged is not None
        self._staged.arm(requests, computed, scheduled, stages)
        self._count_complete(requests, computed, scheduled)
        return slots

    def _stage_batch(self, batch: InputBatch, rows: StageRows) -> InputBatch:
        starts = rows.starts
        seq_lens = torch.from_numpy(rows.seq_lens)
        return dataclasses.replace(
            batch,
            num_scheduled_tokens=rows.counts,
            num_tokens=rows.num_rows,
            num_tokens_after_padding=rows.num_rows,
            query_start_loc=torch.from_numpy(starts).to(self.device),
            query_start_loc_np=starts,
            seq_lens=seq_lens.to(self.device),
            seq_lens_cpu_upper_bound=seq_lens,
        )

    def _fill_slots(
        self, stage: int, batch: InputBatch, query_start_loc: Tensor, indices: Tensor
    ) -> None:
        # vLLM's kernel serves all groups at once; this stage's rows of its result are kept
        self.block_tables.compute_slot_mappings(
            batch.idx_mapping,
            query_start_loc,
            indices,
            num_tokens_padded=batch.num_tokens_after_padding,
            out=self._slots_of_stage,
        )
        for group in self._groups[stage]:
            self.block_tables.slot_mappings[group].copy_(self._slots_of_stage[group])

    def _count_complete(
        self, requests: list[PrunedRequest | None], computed: np.ndarray, scheduled: np.ndarray
    ) -> None:
        for request, before, new in zip(requests, computed, scheduled, strict=True):
            if request is None or not before < request.layout.num_tokens <= before + new:
                continue
            policy, visual = request.plan.pruning.policy("visual"), request.plan.visual
            if policy is None or visual is None:
                continue
            self.stats.count_visual(policy.name, request.layout.num_visual, visual.kept[-1])

    @property
    def kv_unsupported(self) -> str | None:
        """Why KV tokens cannot be evicted here, or None; known once there is a cache."""
        return self._shape.kv_unsupported

    @property
    def channels_unsupported(self) -> str | None:
        """Why KV channels cannot be pruned here, or None; known once there is a cache."""
        return self._shape.channels_unsupported

    def kv_bytes_saved(self) -> int:
        """Return the bytes of KV blocks that live pruned requests do without, from block tables."""
        saved = 0
        for index in np.flatnonzero(self._is_pruned):
            computed = int(self.req_states.num_computed_tokens_np[index])
            for group, config in enumerate(self.kv_cache_config.kv_cache_groups):
                spec = config.kv_cache_spec
                held = int(self.block_tables.num_blocks.np[group, index])
                unpruned = -(-computed // spec.block_size)
                saved += max(0, unpruned - held) * spec.page_size_bytes * len(config.layer_names)
        return saved


class CPUPruningModelRunner(PruningModelRunner, CPUModelRunner):
    """The same on the CPU."""
