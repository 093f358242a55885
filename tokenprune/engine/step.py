"""What one step of the worker computes per stage, in integers: which rows, slots and lengths.

For requests that are not pruned, or whose prompt is complete, every stage sees the same rows and
only the cache index moves. While a pruned prompt is prefilled ("a pruning step") later stages see
fewer rows. How many is known before the forward pass, so attention metadata and slot mappings
are built up front; which rows a data-dependent policy keeps is decided inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenprune.lengths import PromptLayout
from tokenprune.policies import ChannelPolicy
from tokenprune.request import RequestPlan

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PrunedRequest:
    """A pruned request as the worker knows it."""

    request_id: str
    layout: PromptLayout
    plan: RequestPlan

    def physical(self, num_computed: int) -> tuple[int, ...]:
        """Return the physical length of every stage."""
        assert self.plan.lengths is not None
        return self.plan.lengths.all_stages(num_computed)

    def peak(self, num_computed: int, num_after: int) -> tuple[int, ...]:
        """Return the slots of every stage during a step."""
        assert self.plan.lengths is not None
        return self.plan.lengths.all_peaks(num_computed, num_after)

    def dropped_once_complete(self) -> tuple[int, ...]:
        """Return, per stage, how far the cache index lies behind the position in decode."""
        return self.behind(self.layout.num_tokens)

    def behind(self, num_computed: int) -> tuple[int, ...]:
        """Return, per stage, how far the cache index lies behind the position in a step."""
        return tuple(num_computed - p for p in self.physical(num_computed))

    @property
    def shrinks(self) -> bool:
        """Whether it gives slots up while it runs."""
        return self.plan.lengths is not None and self.plan.lengths.shrinks

    @property
    def kv_method(self) -> str:
        """The KV method's name."""
        policy = self.plan.pruning.policy("kv")
        assert policy is not None
        return policy.name

    @property
    def freeing_method(self) -> str:
        """What empties blocks while the request runs, e.g. `lagkv` or `lagkv+think`."""
        plans = {"kv": self.plan.kv, "channels": self.plan.channels}
        asked = (self.plan.pruning.policy(axis) for axis, plan in plans.items() if plan)
        return "+".join(policy.name for policy in asked if policy)

    def packed_blocks(self, num_computed: int) -> tuple[int, ...]:
        """Return the packed blocks of every stage."""
        lengths = self.plan.lengths
        assert lengths is not None
        return tuple(lengths.packed_blocks(num_computed, s) for s in range(len(lengths.dropped)))

    def drops_rows(self, num_computed: int) -> bool:
        """Return whether a step from `num_computed` tokens on has fewer rows in later stages."""
        return self.plan.visual is not None and num_computed < self.layout.num_tokens


@dataclass(frozen=True, slots=True)
class StageRows:
    """The rows of one stage in one step.

    Attributes:
        counts: `[num_reqs]` rows of each request.
        starts: `[num_reqs + 1]` where each request's rows begin.
        base: `[num_reqs]` cache index of each request's first row.
        seq_lens: `[num_reqs]` slots during the step, its own tokens included. Of a row with packed
            blocks only its own tokens: what vLLM makes of such a row is overwritten.
        idle: Rows that stand in for a request with nothing to compute here: attention cannot
            take an empty query, so one row runs, is not written to the cache and is not read.
    """

    counts: IntArray
    starts: IntArray
    base: IntArray
    seq_lens: IntArray
    idle: IntArray

    @property
    def num_rows(self) -> int:
        """Rows of the whole stage."""
        return int(self.starts[-1])

    def cache_indices(self) -> NDArray[np.int64]:
        """Return the cache index of every row, int64 `[num_rows]`."""
        within = np.arange(self.num_rows) - np.repeat(self.starts[:-1], self.counts)
        return np.repeat(self.base, self.counts) + within


def stage_rows(
    requests: Sequence[PrunedRequest | None],
    computed: IntArray,
    scheduled: IntArray,
    num_stages: int,
) -> list[StageRows]:
    """Count the rows of every stage of a step.

    Args:
        requests: `[num_reqs]` the pruned requests of the batch, None for the others.
        computed: `[num_reqs]` tokens computed before the step.
        scheduled: `[num_reqs]` tokens of the step.
        num_stages: Stages of the engine.
    """
    before = np.repeat(computed[None], num_stages, axis=0).astype(np.int32)
    after = before + scheduled.astype(np.int32)
    packed = np.zeros_like(before)
    for i, request in enumerate(requests):
        if request is not None:
            before[:, i] = request.physical(int(computed[i]))
            after[:, i] = request.peak(int(computed[i]), int(computed[i] + scheduled[i]))
            packed[:, i] = request.packed_blocks(int(computed[i]))
    stages = []
    for stage in range(num_stages):
        counts = after[stage] - before[stage]
        empty = np.flatnonzero(counts == 0)
        counts = np.maximum(counts, 1)
        starts = np.zeros(len(counts) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        stages.append(
            StageRows(
                counts=counts,
                starts=starts,
                base=before[stage],
                seq_lens=np.where(packed[stage] > 0, counts, np.maximum(after[stage], 1)),
                idle=starts[empty],
            )
        )
    return stages


def known_rows(request: PrunedRequest, computed: int, scheduled: int) -> list[IntArray]:
    """Return, per stage, which of a chunk's tokens are kept, for a plan that knows beforehand.

    Returns:
        Ascending offsets into the chunk; never empty, see `StageRows.idle`.
    """
    lengths = request.plan.lengths
    assert lengths is not None
    rows = []
    kept = np.arange(computed, computed + scheduled, dtype=np.int32)
    for dropped in lengths.dropped:
        assert not isinstance(dropped, int), "the plan does not know its rows"
        left = kept[~np.isin(kept, np.asarray(dropped, dtype=np.int32), assume_unique=True)]
        kept = left if len(left) else kept[-1:]
        rows.append((kept - computed).astype(np.int32))
    return rows


@dataclass(frozen=True, slots=True)
class Due:
    """What one step leaves to evict of one request at one stage, in cache indices.

    Attributes:
        first: Index of the first partition to cut down, counted from the sink.
        count: Partitions to cut down.
        begin: Where the first of them begins in the cache.
        end: Slots in use.
        lag: Tokens of a partition.
        keep: Tokens kept of each.
    """

    first: int
    count: int
    begin: int
    end: int
    lag: int
    keep: int

    @property
    def evicted(self) -> int:
        """Slots given up."""
        return self.count * (self.lag - self.keep)


def due(request: PrunedRequest, before: int, after: int, stage: int) -> Due | None:
    """Return what the step from `before` to `after` tokens leaves to evict, or None."""
    lengths = request.plan.lengths
    assert lengths is not None
    eviction = lengths.eviction
    assert eviction is not None
    first = lengths.partitions_cut(before, stage)
    count = lengths.partitions_cut(after, stage) - first
    keep = eviction.keep[stage]
    if count == 0 or keep == eviction.lag:
        return None
    begin = eviction.sink + first * keep - lengths.saved_by_packing(before, stage)
    end = lengths.peak(before, after, stage)
    return Due(first, count, begin, end, eviction.lag, keep)


@dataclass(frozen=True, slots=True)
class DuePacking:
    """Which tokens of one request at one stage a step leaves to pack, in cache indices.

    Attributes:
        first: Packed blocks there already.
        count: Blocks to pack; the tokens lie behind the packed blocks.
        end: Slots in use, eviction done.
        block: Slots of a block.
        tokens: Tokens of a packed block.
    """

    first: int
    count: int
    end: int
    block: int
    tokens: int


def due_packing(request: PrunedRequest, before: int, after: int, stage: int) -> DuePacking | None:
    """Return what the step from `before` to `after` tokens leaves to pack, or None."""
    lengths = request.plan.lengths
    assert lengths is not None
    assert lengths.packing is not None
    first = lengths.packed_blocks(before, stage)
    count = lengths.packed_blocks(after, stage) - first
    if count == 0:
        return None
    end = lengths.held(after, stage) - lengths.saved_by_packing(before, stage)
    return DuePacking(first, count, end, lengths.packing.block, lengths.packing.tokens)


def window_rows(request: PrunedRequest, before: int, after: int, stage: int) -> range:
    """Return which rows of a step, counted from the request's first, end the prompt at `stage`.

    The window is the last rows of the prompt that reach the stage; a step may hold part of it.
    """
    policy, lengths = request.plan.pruning.policy("channels"), request.plan.lengths
    assert isinstance(policy, ChannelPolicy)
    assert lengths is not None
    prompt = request.layout.num_tokens
    if before >= prompt:
        return range(0)
    begin, end = lengths.entered(before, stage), lengths.entered(min(after, prompt), stage)
    first = max(begin, lengths.entered(prompt, stage) - policy.window)
    return range(first - begin, max(first, end) - begin)
