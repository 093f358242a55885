"""What one step of the worker computes per stage, in integers: which rows, slots and lengths.

For requests that are not pruned, or whose prompt is complete, every stage sees the same rows and
only the cache index moves. While a pruned prompt is prefilled ("a pruning step") later stages see
fewer rows. How many is known before the forward pass, so attention metadata and slot mappings
are built up front; which rows a data-dependent policy keeps is decided inside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenprune.lengths import PhysicalLengths, PromptLayout
from tokenprune.plan import RequestPlan
from tokenprune.policies import KnownRows

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PrunedRequest:
    """A pruned request as the worker knows it."""

    request_id: str
    layout: PromptLayout
    plan: RequestPlan

    @property
    def lengths(self) -> PhysicalLengths:
        """Its physical lengths."""
        return self.plan.lengths

    def index_offset(self, num_computed: int) -> tuple[int, ...]:
        """Return, per stage, position minus cache index of a step's first token."""
        return tuple(num_computed - p for p in self.lengths.all_stages(num_computed))

    @property
    def freeing_method(self) -> str:
        """What empties blocks while the request runs, e.g. `lagkv` or `lagkv+think`."""
        parts = (self.plan.kv, self.plan.channels)
        return "+".join(part.policy.name for part in parts if part is not None)

    def drops_rows(self, num_computed: int) -> bool:
        """Return whether a step from `num_computed` tokens on has fewer rows in later stages."""
        return self.plan.visual is not None and num_computed < self.layout.num_tokens

    def waits(self, num_computed: int) -> bool:
        """Return whether later stages wait for the rest of the prompt."""
        waiting = self.plan.waiting_rows(num_computed) > 0
        return waiting and num_computed < self.layout.num_tokens

    def needs_no_graph(self, before: int, after: int) -> bool:
        """Return whether the step from `before` to `after` tokens cannot be a CUDA graph."""
        is_observed = self.plan.query_window > 0 and before < self.layout.num_tokens
        # a graph has room for one row of a request that attends to packed blocks
        return is_observed or (self.plan.channels is not None and after > before + 1)

    def ends_prompt(self, before: int, after: int) -> bool:
        """Return whether the step from `before` to `after` tokens completes the prompt."""
        return before < self.layout.num_tokens <= after


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


@dataclass(frozen=True, slots=True)
class PrunedStep:
    """A step that holds pruned requests.

    Attributes:
        requests: `[num_reqs]` the pruned requests of the batch, None for the others.
        indices: `[num_reqs]` their rows in vLLM's tables.
        before: `[num_reqs]` tokens computed before the step.
        scheduled: `[num_reqs]` tokens of the step.
        full_starts: `[num_reqs + 1]` where each request's tokens begin.
        stages: Rows per stage where later stages have fewer of them; None where all have all.
    """

    requests: Sequence[PrunedRequest | None]
    indices: NDArray[Any]
    before: NDArray[Any]
    scheduled: NDArray[Any]
    full_starts: NDArray[Any]
    stages: Sequence[StageRows] | None = None

    def starts(self, stage: int) -> NDArray[Any]:
        """Return `[num_reqs + 1]` where each request's rows begin at `stage`."""
        return self.full_starts if self.stages is None else self.stages[stage].starts

    def pruned(self) -> Iterator[tuple[int, PrunedRequest, int, int]]:
        """Yield place in the batch, request, and tokens computed before and after the step."""
        for place, request in enumerate(self.requests):
            if request is not None:
                before = int(self.before[place])
                yield place, request, before, before + int(self.scheduled[place])


class StepActor(Protocol):
    """Something that acts in steps with pruned requests; the runner calls it in this order."""

    def begin_step(self, step: PrunedStep) -> None:
        """Prepare for the coming forward pass."""

    def after_forward(self, step: PrunedStep) -> None:
        """Act on the caches once the forward pass is enqueued."""

    def end_step(self) -> None:
        """Forget the step, whether it succeeded or not."""


def stage_rows(
    requests: Sequence[PrunedRequest | None],
    before: IntArray,
    scheduled: IntArray,
    num_stages: int,
) -> list[StageRows]:
    """Count the rows of every stage of a step.

    Args:
        requests: `[num_reqs]` the pruned requests of the batch, None for the others.
        before: `[num_reqs]` tokens computed before the step.
        scheduled: `[num_reqs]` tokens of the step.
        num_stages: Stages of the engine.
    """
    base = np.repeat(before[None], num_stages, axis=0).astype(np.int32)
    peak = base + scheduled.astype(np.int32)
    packed = np.zeros_like(base)
    for i, request in enumerate(requests):
        if request is not None:
            lengths, first = request.lengths, int(before[i])
            base[:, i] = lengths.all_stages(first)
            peak[:, i] = lengths.all_peaks(first, first + int(scheduled[i]))
            packed[:, i] = lengths.all_packed_blocks(first)
    stages = []
    for stage in range(num_stages):
        counts = peak[stage] - base[stage]
        empty = np.flatnonzero(counts == 0)
        counts = np.maximum(counts, 1)
        starts = np.zeros(len(counts) + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        stages.append(
            StageRows(
                counts=counts,
                starts=starts,
                base=base[stage],
                seq_lens=np.where(packed[stage] > 0, counts, np.maximum(peak[stage], 1)),
                idle=starts[empty],
            )
        )
    return stages


def known_rows(plan: KnownRows, before: int, scheduled: int) -> list[IntArray]:
    """Return, per stage, which of a chunk's tokens are kept.

    Returns:
        Ascending offsets into the chunk; never empty, see `StageRows.idle`.
    """
    rows = []
    kept = np.arange(before, before + scheduled, dtype=np.int32)
    for dropped in plan.dropped:
        gone = np.asarray(dropped.positions, dtype=np.int32)
        left = kept[~np.isin(kept, gone, assume_unique=True)]
        kept = left if len(left) else kept[-1:]
        rows.append((kept - before).astype(np.int32))
    return rows


@dataclass(frozen=True, slots=True)
class EvictionWork:
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


def eviction_due(
    lengths: PhysicalLengths, before: int, after: int, stage: int
) -> EvictionWork | None:
    """Return what the step from `before` to `after` tokens leaves to evict, or None."""
    eviction = lengths.eviction
    if eviction is None:
        return None
    first = lengths.partitions_cut(before, stage)
    count = lengths.partitions_cut(after, stage) - first
    keep = eviction.keep[stage]
    if count == 0 or keep == eviction.lag:
        return None
    begin = eviction.sink + first * keep - lengths.saved_by_packing(before, stage)
    end = lengths.peak(before, after, stage)
    return EvictionWork(first, count, begin, end, eviction.lag, keep)


@dataclass(frozen=True, slots=True)
class PackingWork:
    """Which tokens of one request at one stage a step leaves to pack, in cache indices.

    Attributes:
        first: Packed blocks there already.
        count: Blocks to pack; the tokens lie after the packed blocks.
        end: Slots in use, eviction done.
        block: Slots of a block.
        tokens: Tokens of a packed block.
    """

    first: int
    count: int
    end: int
    block: int
    tokens: int


def packing_due(
    lengths: PhysicalLengths, before: int, after: int, stage: int
) -> PackingWork | None:
    """Return what the step from `before` to `after` tokens leaves to pack, or None."""
    packing = lengths.packing
    if packing is None:
        return None
    first = lengths.packed_blocks(before, stage)
    count = lengths.packed_blocks(after, stage) - first
    if count == 0:
        return None
    end = lengths.tokens_held(after, stage) - lengths.saved_by_packing(before, stage)
    return PackingWork(first, count, end, packing.block, packing.tokens)


def window_rows(request: PrunedRequest, before: int, after: int, stage: int) -> range:
    """Return which rows of a step, counted from the request's first, end the prompt at `stage`.

    The window is the last rows of the prompt that reach the stage, as many as the request's
    methods look at; a step may hold part of it.
    """
    lengths, prompt = request.lengths, request.layout.num_tokens
    window = request.plan.query_window
    if before >= prompt or window == 0:
        return range(0)
    begin, end = lengths.written(before, stage), lengths.written(min(after, prompt), stage)
    first = max(begin, lengths.written(prompt, stage) - window)
    return range(first - begin, max(first, end) - begin)
