"""KV cache spec with a stage, and its manager that counts blocks by physical length.

A request holds `ceil(P / block_size)` blocks between steps. For a step it is given the blocks of
its peak, since new tokens are appended before others are evicted; what the step empties goes
back to the pool at the head of the next `schedule()`, which knows that the step was issued.

Blocks that hold what anybody's would are in the prefix cache (`private_rows.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from typing import Any, Self

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from tokenprune.engine.private_rows import PrivateRows
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
        private_rows: Decides for all groups together; None while there is no prefix cache.
        moved_rows: Per request, the blocks that its row moves to in the step being scheduled.
        hashed_in_step: Ids of blocks that are computed in the step being scheduled and can be found
            already; None where nobody asks.
    """

    kv_cache_spec: StagedAttentionSpec

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: Mapping[str, RequestPlan] = {}
        self.num_computed: Callable[[str], int] = lambda _: 0
        self.max_step = 0
        self.private_rows: PrivateRows | None = None
        self.moved_rows: dict[str, list[KVCacheBlock]] = {}
        self._last_step: tuple[RequestPlan | None, int, int] = (None, 0, 0)
        self._last_peak = 0
        self.hashed_in_step: set[int] | None = None
        # requests of which nothing is hashed any more
        self._closed: set[str] = set()
        # requests whose row of this stage has been rewritten; it is asked often, and stays so
        self._rewritten: set[str] = set()

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
        # asked for twice in a step: once to count, once to allocate
        step = plan, self.num_computed(request_id), num_tokens
        if self._last_step[0] is not plan or self._last_step[1:] != step[1:]:
            self._last_step = step
            self._last_peak = lengths.peak(step[1], num_tokens, stage)
        return self._last_peak

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Count by physical length, also for the admission check."""
        if request_id not in self.plans:
            return super().get_num_blocks_to_allocate(
                request_id, num_tokens, new_computed_blocks, *args, **kwargs
            )
        whole = bool(kwargs.get("apply_admission_cap", False))
        physical = self._physical(request_id, num_tokens, all_steps=whole)
        needed = super().get_num_blocks_to_allocate(
            request_id, physical, new_computed_blocks, *args, **kwargs
        )
        if whole:
            # alone a request shares no block, and then it needs no more
            return needed
        moving = self._moving(request_id, num_tokens)
        if not moving:
            return needed
        held = self.req_to_blocks.get(request_id, [])
        found = new_computed_blocks[max(0, moving.start - len(held)) : moving.stop - len(held)]
        # what is found is referenced by this request too once it is admitted
        others = sum(b.ref_cnt > 1 for b in held[moving.start : moving.stop])
        return needed + others + sum(b.ref_cnt > 0 for b in found)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Allocate by physical length, and the blocks that a row moves to."""
        if request_id not in self.plans:
            return super().allocate_new_blocks(request_id, num_tokens, *args, **kwargs)
        moving = self._moving(request_id, num_tokens)
        has_room = (
            len(moving) > 0
            and self.private_rows is not None
            and self.private_rows.has_room(request_id, num_tokens)
        )
        new = super().allocate_new_blocks(
            request_id, self._physical(request_id, num_tokens), *args, **kwargs
        )
        if moving:
            self._move(request_id, num_tokens, moving, has_room)
        return new

    def _moving(self, request_id: str, num_tokens: int) -> range:
        """Return the places in its row that the step to `num_tokens` is the first to rewrite."""
        plan = self.plans.get(request_id)
        if self.private_rows is None or plan is None or request_id in self._rewritten:
            return range(0)
        lengths, stage = plan.lengths, self.kv_cache_spec.stage
        if not lengths.frees_blocks or not lengths.is_rewritten(num_tokens, stage):
            return range(0)
        if lengths.is_rewritten(self.num_computed(request_id), stage):
            self._rewritten.add(request_id)
            return range(0)
        first, until = lengths.rewritten_from, lengths.rewritten_until(num_tokens, stage)
        return range(first // self.block_size, -(-until // self.block_size))

    def _shared(self, request_id: str, num_tokens: int, moving: range) -> list[int]:
        """Return which places of a moving row others can find, as soon as the step is scheduled."""
        row = self.req_to_blocks.get(request_id, [])
        full = 0
        if request_id not in self._closed:
            shared_tokens = min(num_tokens, self.plans[request_id].shared_tokens)
            full = shared_tokens // self.block_size
        return [
            place
            for place in moving
            if place < full
            or (place < len(row) and (row[place].ref_cnt > 1 or row[place].block_hash is not None))
        ]

    def num_blocks_to_move(self, request_id: str, num_tokens: int) -> int:
        """Return the blocks of the step to `num_tokens` if hashed ones are left to others."""
        held = len(self.req_to_blocks.get(request_id, ()))
        needed = -(-self._physical(request_id, num_tokens) // self.block_size)
        moving = self._moving(request_id, num_tokens)
        return max(0, needed - held) + len(self._shared(request_id, num_tokens, moving))

    def _move(self, request_id: str, num_tokens: int, moving: range, has_room: bool) -> None:
        row = self.req_to_blocks[request_id]
        if has_room:
            left = self._shared(request_id, num_tokens, moving)
        else:
            left = [place for place in moving if row[place].ref_cnt > 1]
            # nobody else reads the others: they are rewritten in place, so nobody may find them
            own = (row[place] for place in moving if row[place].ref_cnt == 1)
            self.block_pool.evict_blocks({b.block_id for b in own if b.block_hash is not None})
            self._closed.add(request_id)
        if not left:
            return
        target = row[: moving.stop]
        fresh = self.block_pool.get_new_blocks(len(left))
        for place, block in zip(left, fresh, strict=True):
            target[place] = block
        self.moved_rows[request_id] = target
        if self.records_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in fresh)

    def take_moved_row(self, request_id: str) -> bool:
        """Put a row in its new blocks, now that the step that moves it is issued.

        Returns:
            Whether there was one.
        """
        target = self.moved_rows.pop(request_id, None)
        if target is None:
            return False
        row = self.req_to_blocks[request_id]
        left = [block for block, own in zip_longest(row, target) if block is not own]
        self.req_to_blocks[request_id] = target
        self.block_pool.free_blocks(reversed(left))
        return True

    def close(self, request_id: str) -> None:
        """Hash no more of a request: its next tokens see what is left of the others."""
        self._closed.add(request_id)

    def free_emptied(self, request_id: str, lengths: Sequence[int]) -> None:
        """Give back the blocks that the last step emptied, of physical `lengths` per stage."""
        held = lengths[self.kv_cache_spec.stage]
        blocks = self.req_to_blocks.get(request_id, [])
        emptied = blocks[-(-held // self.block_size) :]
        if emptied:
            del blocks[-len(emptied) :]
            self.block_pool.free_blocks(reversed(emptied))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Give up both rows of a request that is about to move."""
        row = super().pop_blocks_for_free(request_id)
        self._closed.discard(request_id)
        self._rewritten.discard(request_id)
        if self.private_rows is not None:
            self.private_rows.forget(request_id)
        target = self.moved_rows.pop(request_id, ())
        return row + [own for block, own in zip(row, target, strict=False) if own is not block]

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Hash what an unpruned request would compute alike, and nothing else."""
        plan = self.plans.get(request.request_id)
        if plan is not None:
            if request.request_id in self._closed:
                return
            num_tokens = min(num_tokens, plan.shared_tokens)
        if self.hashed_in_step is None:
            super().cache_blocks(request, num_tokens, *args, **kwargs)
            return
        before = self.num_cached_block.get(request.request_id, 0)
        super().cache_blocks(request, num_tokens, *args, **kwargs)
        after = self.num_cached_block.get(request.request_id, 0)
        if after > before:
            row = self.req_to_blocks[request.request_id]
            self.hashed_in_step.update(block.block_id for block in row[before:after])

    def _cache_partial_tail_block(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """Hash no block in part that will be rewritten: a row is moved by whole blocks."""
        if request.request_id not in self.plans:
            super()._cache_partial_tail_block(request, *args, **kwargs)


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
