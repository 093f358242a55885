"""KV cache spec with a stage, and its manager that counts blocks by physical length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from tokenprune.request import RequestPlan


@dataclass(frozen=True, kw_only=True)
class StagedAttentionSpec(FullAttentionSpec):
    """Full attention of one stage: layers of different stages never share a KV cache group."""

    stage: int

    @classmethod
    def of(cls, spec: FullAttentionSpec, stage: int) -> Self:
        """Return `spec` with a stage."""
        values = {f.name: getattr(spec, f.name) for f in fields(spec) if f.init}
        return cls(**values, stage=stage)

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """Merge specs of one stage; vLLM reads an AssertionError as "not uniform"."""
        stages = {spec.stage for spec in specs}
        assert len(stages) == 1, f"layers of different stages must not merge, got {stages}"
        return cls.of(FullAttentionSpec.merge(specs), stages.pop())

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
    """

    kv_cache_spec: StagedAttentionSpec

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: Mapping[str, RequestPlan] = {}

    def _physical(self, request_id: str, num_tokens: int) -> int:
        plan = self.plans.get(request_id)
        if plan is None or plan.lengths is None:
            return num_tokens
        return plan.lengths.physical(num_tokens, self.kv_cache_spec.stage)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """Count by physical length, also for the admission check."""
        return super().get_num_blocks_to_allocate(
            request_id, self._physical(request_id, num_tokens), *args, **kwargs
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Allocate by physical length."""
        return super().allocate_new_blocks(
            request_id, self._physical(request_id, num_tokens), *args, **kwargs
        )

    def cache_blocks(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """Keep pruned requests out of the prefix cache: their blocks hold other tokens."""
        if request.request_id not in self.plans:
            super().cache_blocks(request, *args, **kwargs)


def register_specs() -> None:
    """Make vLLM know the staged spec; safe to call again."""
    # registering ours into an empty registry would hide the built-in specs
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(
        StagedAttentionSpec, manager_class=StagedManager, uniform_type_base_spec=StagedAttentionSpec
    )
