"""KV cache spec with a stage, and its manager that counts blocks by physical length.

A request holds `ceil(P / block_size)` blocks between steps. For a step it is given the blocks of
its peak, since new tokens are appended before others are evicted; what the step empties goes
back to the pool at the head of the next `schedule()`, which knows that the step was issued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from tokenprune.plan import RequestPlan
from tokenprune.shape import EngineShape, Feature

NO_LAYOUT = "the layout of the KV cache is not known"
NOT_PLAIN = "attention has sinks of its own or caps its logits"


@dataclass(frozen=True, kw_only=True)
class StagedAttentionSpec(FullAttentionSpec):
    """Full attention of one stage: layers of different stages never share a KV cache group.

    Attributes:
        stage: Stage of the layer.
        evicts: Whether the worker can move this layer's rows; said by the worker, which knows the
            attention backend, and read by the scheduler.
        packs: Whether its rows may also be packed with fewer channels; said by the worker too.
    """

    stage: int
    evicts: bool = False
    packs: bool = False

    @classmethod
    def of(
        cls, spec: FullAttentionSpec, stage: int, evicts: bool = False, packs: bool = False
    ) -> Self:
        """Return `spec` with a stage."""
        values = {f.name: getattr(spec, f.name) for f in fields(spec) if f.init}
        return cls(**(values | {"stage": stage, "evicts": evicts, "packs": packs}))

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """Merge specs of one stage; vLLM reads an AssertionError as "not uniform"."""
        stages = {spec.stage for spec in specs}
        assert len(stages) == 1, f"layers of different stages must not merge, got {stages}"
        evicts = all(spec.evicts for spec in specs)
        packs = all(spec.packs for spec in specs)
        return cls.of(FullAttentionSpec.merge(specs), stages.pop(), evicts, packs)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Return whether all layers are of this stage."""
        return all(
            isinstance(spec, StagedAttentionSpec) and spec.stage == self.stage
            for spec in kv_cache_specs.values()
        )


class StagedManager(FullAttentionManager):
    """Allocates `ceil(P(n, stage) / block_size)` blocks to a request of `n` tokens.

    Attributes:
        plans: Plans of the pruned requests by id; the scheduler shares its own mapping.
        num_computed: Returns the tokens of a request computed so far, in-flight steps included.
        max_step: Most tokens of one request in one step.
    """

    kv_cache_spec: StagedAttentionSpec

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: Mapping[str, RequestPlan] = {}
        self.num_computed: Callable[[str], int] = lambda _: 0
        self.max_step = 0

    def _physical(self, request_id: str, num_tokens: int, *, all_steps: bool = False) -> int:
        """Return the slots needed to get to `num_tokens`, in one step or in all there may be."""
        plan = self.plans.get(request_id)
        if plan is None:
            return num_tokens
        lengths, stage = plan.lengths, self.kv_cache_spec.stage
        if not lengths.frees_blocks:
            return lengths.physical(num_tokens, stage)
        if all_steps:
            return lengths.peak_bound(num_tokens, self.max_step, stage)
        return lengths.peak(self.num_computed(request_id), num_tokens, stage)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """Count by physical length, also for the admission check."""
        whole = bool(kwargs.get("apply_admission_cap", False))
        physical = self._physical(request_id, num_tokens, all_steps=whole)
        return super().get_num_blocks_to_allocate(request_id, physical, *args, **kwargs)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Allocate by physical length."""
        return super().allocate_new_blocks(
            request_id, self._physical(request_id, num_tokens), *args, **kwargs
        )

    def free_emptied(self, request_id: str, num_computed: int) -> None:
        """Give back the blocks that the last step emptied."""
        held = self.plans[request_id].lengths.physical(num_computed, self.kv_cache_spec.stage)
        blocks = self.req_to_blocks.get(request_id, [])
        emptied = blocks[-(-held // self.block_size) :]
        if emptied:
            del blocks[-len(emptied) :]
            self.block_pool.free_blocks(reversed(emptied))

    def cache_blocks(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """Keep pruned requests out of the prefix cache: their blocks hold other tokens."""
        if request.request_id not in self.plans:
            super().cache_blocks(request, *args, **kwargs)


def shape_of_cache(shape: EngineShape, specs: Sequence[KVCacheSpec]) -> EngineShape:
    """Return the engine's shape with what its KV cache groups say; the same in every process."""
    # backends may change what the configuration says of blocks before the cache is made
    shape = replace(shape, block_size=specs[0].block_size)
    lacks: dict[Feature, str] = {}
    if not all(isinstance(spec, StagedAttentionSpec) and spec.evicts for spec in specs):
        lacks = {"kv": NO_LAYOUT, "channels": NO_LAYOUT}
    elif not all(spec.packs for spec in specs):
        lacks = {"channels": NOT_PLAIN}
    return replace(shape, unsupported=lacks | dict(shape.unsupported))


def register_specs() -> None:
    """Make vLLM know the staged spec; safe to call again."""
    # registering ours into an empty registry would hide the built-in specs
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(
        StagedAttentionSpec, manager_class=StagedManager, uniform_type_base_spec=StagedAttentionSpec
    )
