"""The model runner: stages in the KV spec, physical slots, pruning steps outside CUDA graphs."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from tokenprune.engine.families import family_of
from tokenprune.engine.kv.cache_layers import cache_layers
from tokenprune.engine.kv.channel_packer import ChannelPacker
from tokenprune.engine.kv.evictor import Evictor
from tokenprune.engine.kv.moved_rows import MovedRows
from tokenprune.engine.kv.query_observer import QueryObserver
from tokenprune.engine.kv_cache import StagedAttentionSpec, shape_of_cache
from tokenprune.engine.layer_specs import staged_specs
from tokenprune.engine.model_state import StagedModelState, stage_groups
from tokenprune.engine.request_table import RequestTable, StepNeeds
from tokenprune.engine.shape import engine_shape, model_shape
from tokenprune.engine.slots import SlotBuilder
from tokenprune.engine.stats import WorkerStats
from tokenprune.engine.step import PrunedStep, StepActor, stage_rows
from tokenprune.engine.visual.image_scores import ImageScorer, ScoredEncoderCache
from tokenprune.engine.visual.staged_prefill import StagedPrefill
from tokenprune.engine.visual.waiting_rows import RowPool
from tokenprune.errors import ConfigurationError
from tokenprune.policies import KVPolicy, methods
from tokenprune.shape import EngineShape


class PruningModelRunner(GPUModelRunner):
    """vLLM's V2 model runner with physical lengths per stage.

    Attributes:
        shape: The engine's shape, with what its KV cache says once there is one.
        stats: The worker's figures.
    """

    model_state: StagedModelState

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shape: EngineShape = engine_shape(self.vllm_config)
        if "importance" not in self.shape.unsupported:
            self.encoder_cache = ScoredEncoderCache()
        self.stats = WorkerStats(self.device, self.shape.num_layers)
        self._table = RequestTable(self.shape, self.max_num_reqs, self.device, self.stats)
        self._staged: StagedPrefill | None = None
        self._observer: QueryObserver | None = None
        self._packer: ChannelPacker | None = None
        self._moved_rows: MovedRows | None = None
        # all that acts in a step, in this order
        self._actors: list[StepActor] = []
        self._step: PrunedStep | None = None
        self._needs = StepNeeds()

    def get_kv_cache_spec(self) -> Any:
        """Give every layer's spec its stage."""
        return staged_specs(super().get_kv_cache_spec(), self.shape, self._attention_layers)

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
        family = family_of(self.vllm_config.model_config.architecture)
        if family is None or "visual" in self.shape.unsupported:
            return
        scorer = None
        tower = family.tower(self.vllm_config, self.model)
        if tower is not None and isinstance(self.encoder_cache, ScoredEncoderCache):
            scorer = ImageScorer(self.model, tower, self.encoder_cache, self.device, self.stats)
        pool = RowPool(
            self._num_waiting_rows,
            self.model_config.get_hidden_size(),
            self.dtype,
            self.device,
        )
        # vLLM gives the KV cache what is left of memory
        self.model_memory_usage += pool.num_bytes
        self._staged = StagedPrefill(
            self.model,
            family.decoder(self.model),
            self.shape,
            pool,
            self.device,
            self.stats,
            scorer,
        )
        self.model_state.before_encoder = self._staged.score_images

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        """Profile with room for the rows that a prompt brings to the step that completes it."""
        reserved = torch.empty(self._num_returning_bytes(), dtype=torch.uint8, device=self.device)
        super().profile_run(*args, **kwargs)
        del reserved

    def _num_returning_bytes(self) -> int:
        """Return what vLLM's largest step does not hold of a step that completes a prompt."""
        if self._staged is None:
            return 0
        model, ranks = model_shape(self.vllm_config), self.parallel_config.tensor_parallel_size
        # of a row: hidden state, residual, their sum and norm; gate, up and product of the MLP
        elements = 4 * model.hidden_size + 3 * model.intermediate_size // ranks
        return self._num_waiting_rows * elements * self.dtype.itemsize

    @property
    def _num_waiting_rows(self) -> int:
        # an engine without stages cannot drop rows
        return int(self.shape.max_num_waiting_tokens or 0) if self.shape.prune_layers else 0

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Initialise, then let pruning steps bypass CUDA graphs."""
        super().initialize_kv_cache(*args, **kwargs)
        self._groups = stage_groups(self.kv_cache_config)
        self._slots = SlotBuilder(self.block_tables, self._groups, self.device)
        specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
        self.shape = shape_of_cache(self.shape, specs)
        # to measure its graphs vLLM makes a cache before the one it serves from
        self._actors = [] if self._staged is None else [self._staged]
        if all(isinstance(spec, StagedAttentionSpec) and spec.evicts for spec in specs):
            self._act_on_caches()
        self._bypass_graphs()

    def _act_on_caches(self) -> None:
        layers = cache_layers(
            self.kv_cache_config, self._groups, self._attention_layers, self.block_tables
        )
        if self._staged is not None:
            self._staged.caches = {layer.attention: layer for layer in layers}
        packs = self.shape.allow_channel_pruning and "channels" not in self.shape.unsupported
        scores_by_queries = any(
            issubclass(cls, KVPolicy) and cls.looks_at_queries for cls in methods("kv").values()
        )
        observer = None
        if packs or scores_by_queries:
            observer = QueryObserver(layers, self.shape.num_stages)
        self._observer = observer
        self._moved_rows = MovedRows(self.block_tables, self.device)
        # tokens are evicted before those that are left are packed, and queries are dropped last
        self._actors.append(Evictor(layers, self.shape, self.stats, self._moved_rows, observer))
        if observer is not None and packs:
            self._packer = ChannelPacker(
                layers,
                observer,
                self.shape.num_stages,
                self.max_num_reqs,
                self.stats,
                self._moved_rows,
            )
            self.model_state.packer = self._packer
            self._actors.append(self._packer)
        if observer is not None:
            self._actors.append(observer)

    def _bypass_graphs(self) -> None:
        dispatch = self.cudagraph_manager.dispatch

        @functools.wraps(dispatch)
        def eager_when_pruning(num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
            descriptor = dispatch(num_reqs, num_tokens, *args, **kwargs)
            if not self._needs.no_graph:
                return descriptor
            return BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.NONE,
                num_tokens=num_tokens,
                num_reqs=num_reqs,
                num_active_loras=descriptor.num_active_loras,
            )

        self.cudagraph_manager.dispatch = eager_when_pruning

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Take over new requests; the scheduler says which of them are pruned."""
        super().add_requests(scheduler_output)
        self._table.add(scheduler_output, self.req_states.req_id_to_index, self.shape)

    def _remove_request(self, req_id: str) -> bool:
        row = self.req_states.req_id_to_index.get(req_id)
        if row is not None and self._table.remove(row):
            if self._observer is not None:
                self._observer.forget(row)
            if self._packer is not None:
                self._packer.forget(row)
            if self._staged is not None:
                self._staged.forget(row)
        return super()._remove_request(req_id)

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Run a step; outside CUDA graphs and compiled code if it prunes."""
        try:
            output = super().execute_model(scheduler_output, *args, **kwargs)
            if self._step is not None:
                for actor in self._actors:
                    actor.after_forward(self._step)
            return output
        finally:
            self._step, self._needs = None, StepNeeds()
            for actor in self._actors:
                actor.end_step()

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Drop emptied blocks, update, then check that the scheduler counts as we do."""
        rows = self.req_states.req_id_to_index
        self._table.drop_emptied_blocks(scheduler_output, rows, self.block_tables, self._groups)
        super().update_requests(scheduler_output)
        self._needs = self._table.update(
            scheduler_output, rows, self.req_states.num_computed_tokens_np, self.block_tables
        )
        if self._moved_rows is not None:
            self._moved_rows.begin_step(self._table.moved_rows(scheduler_output, rows))

    def prepare_attn(self, input_batch: InputBatch) -> tuple[tuple[Tensor, ...], Any]:
        """Compute block tables and slots, by physical length where requests are pruned."""
        self.model_state.step = None
        rows = input_batch.idx_mapping_np
        if not self._table.is_pruned[rows].any():
            return super().prepare_attn(input_batch)
        block_tables = self.block_tables.gather_block_tables(
            input_batch.idx_mapping, num_reqs_padded=input_batch.num_reqs_after_padding
        )
        self._step = step = self._pruned_step(input_batch)
        slots: Any
        if step.stages is not None:
            self.model_state.step, slots = self._slots.staged(input_batch, step)
        else:
            limits = None
            if self._packer is not None:
                limits = self._packer.own_rows(step, self.shape.num_stages)
            self.model_state.step, slots = self._slots.shifted(input_batch, self._table, limits)
        for actor in self._actors:
            actor.begin_step(step)
        return block_tables, slots

    def _pruned_step(self, batch: InputBatch) -> PrunedStep:
        requests = [self._table.requests[row] for row in batch.idx_mapping_np]
        before, scheduled = batch.num_computed_tokens_np, batch.num_scheduled_tokens
        stages = None
        if self._needs.drops_rows:
            stages = stage_rows(requests, before, scheduled, self.shape.num_stages)
        return PrunedStep(
            requests,
            batch.idx_mapping_np,
            before,
            scheduled,
            np.concatenate([[0], np.cumsum(scheduled)]),
            stages,
        )

    def kv_bytes_saved(self) -> int:
        """Return the bytes of KV blocks that live pruned requests do without."""
        groups = self.kv_cache_config.kv_cache_groups
        computed = self.req_states.num_computed_tokens_np
        return self._table.kv_bytes_saved(computed, self.block_tables, groups)


class CPUPruningModelRunner(PruningModelRunner, CPUModelRunner):
    """The same on the CPU."""
