"""Evicts KV tokens of live requests: after a step's forward pass, kept rows move to the front.

Runs on the stream of the step, before the next one, so whatever the next step writes into blocks
that were emptied comes later. Which partitions are due follows from the plan and the step's token
counts; which tokens of them stay follows from the policy's scores, made from the cache itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune.engine.guard import PolicyGuard, checked
from tokenprune.engine.kv.cache_layers import MAX_READ, CacheLayer
from tokenprune.engine.kv.moved_rows import MovedRows
from tokenprune.engine.kv.query_observer import QueryObserver
from tokenprune.engine.stats import WorkerStats
from tokenprune.engine.step import EvictionWork, PrunedRequest, PrunedStep, eviction_due
from tokenprune.figures import Op
from tokenprune.kernels import lag_keep
from tokenprune.lengths import PhysicalLengths
from tokenprune.policies import KVPolicy, Segments
from tokenprune.shape import EngineShape


class Evictor:
    """Evicts in the caches of one worker.

    Args:
        layers: Attention layers.
        shape: The engine's shape.
        stats: Where operations are timed and tokens counted.
        moved_rows: Where rows go that move in the step.
        observer: Has the queries that end a prompt; None where nobody looks at them.
    """

    def __init__(
        self,
        layers: Sequence[CacheLayer],
        shape: EngineShape,
        stats: WorkerStats,
        moved_rows: MovedRows,
        observer: QueryObserver | None = None,
    ) -> None:
        self._layers = layers
        self._shape = shape
        self._stats = stats
        self._moved_rows = moved_rows
        self._observer = observer
        self._guard = PolicyGuard(stats)

    def begin_step(self, step: PrunedStep) -> None:
        """Nothing is to be prepared."""

    def after_forward(self, step: PrunedStep) -> None:
        """Evict what is due of every request."""
        for place, request, before, after in step.pruned():
            kv = request.plan.kv
            if kv is None:
                continue
            self._evict(request, kv.policy, int(step.indices[place]), before, after)
            self._count(request, kv.policy, before, after)

    def end_step(self) -> None:
        """Nothing is to be forgotten."""

    def _evict(
        self, request: PrunedRequest, policy: KVPolicy, index: int, before: int, after: int
    ) -> None:
        stages = range(self._shape.num_stages)
        due = [eviction_due(request.lengths, before, after, stage) for stage in stages]
        if not any(due):
            return
        moved = set()
        for place, layer in enumerate(self._layers):
            work = due[layer.stage]
            if work is None:
                continue
            into = self._moved_rows.of(index, layer.group)
            moved.add(layer.group)
            if into is not None:
                self._keep_first(request.lengths, work, layer, index, into)
            if policy.keeps_newest:
                begin = work.begin - work.first * work.keep
                rest = begin + work.evicted
            else:
                self._cut_down(policy, work, layer, place, index, into)
                begin = work.begin + work.count * work.keep
                rest = work.begin + work.count * work.lag
            self._move_rows(layer, index, range(rest, work.end), begin, into)
        self._moved_rows.settle(index, moved)

    def _keep_first(
        self,
        lengths: PhysicalLengths,
        work: EvictionWork,
        layer: CacheLayer,
        index: int,
        into: Tensor,
    ) -> None:
        """Take what is never evicted along, from the first block on that is left to others."""
        block_size = layer.cache.shape[2]
        first = lengths.rewritten_from // block_size * block_size
        self._move_rows(layer, index, range(first, work.begin), first, into)

    def _move_rows(
        self, layer: CacheLayer, index: int, rows: range, begin: int, into: Tensor | None
    ) -> None:
        with self._stats.time(Op.KV_COMPACT):
            source = torch.arange(rows.start, rows.stop, device=layer.cache.device)[None]
            layer.layout.move(layer.cache, layer.blocks[index], source, begin, into)

    def _cut_down(
        self,
        policy: KVPolicy,
        work: EvictionWork,
        layer: CacheLayer,
        place: int,
        index: int,
        into: Tensor | None,
    ) -> None:
        cache, blocks, lag = layer.cache, layer.blocks[index], work.lag
        heads, width = cache.shape[1], cache.shape[3]
        at_once = max(1, MAX_READ // (heads * width * lag) - 1)
        for done in range(0, work.count, at_once):
            count = min(at_once, work.count - done)
            begin = work.begin + done * lag
            with self._stats.time(Op.KV_SELECT):
                segments = self._segments(
                    policy, layer, place, index, begin, count, work.first + done, lag
                )
                kept = lag_keep(self._scores(policy, segments), work.keep)
            with self._stats.time(Op.KV_COMPACT):
                offsets = torch.arange(begin, begin + count * lag, lag, device=cache.device)
                source = (kept + offsets[:, None]).flatten(1)
                layer.layout.move(cache, blocks, source, work.begin + done * work.keep, into)

    def _scores(self, policy: KVPolicy, segments: Segments) -> Tensor:
        shape = (segments.num_heads, segments.num_partitions, segments.lag)
        return self._guard.ask(
            policy,
            lambda: checked(policy.score(segments), shape).float().contiguous(),
            # the newest of each partition
            lambda: torch.arange(segments.lag, device=segments.device).float().expand(shape),
        )

    def _segments(
        self,
        policy: KVPolicy,
        layer: CacheLayer,
        place: int,
        index: int,
        begin: int,
        count: int,
        first: int,
        lag: int,
    ) -> Segments:
        keys: Tensor | None = None
        values: Tensor | None = None
        queries: Tensor | None = None
        if policy.reads_cache:
            # the partition after the last one is its reference
            end = begin + (count + 1) * lag
            keys, values = layer.layout.read(layer.cache, layer.blocks[index], begin, end)
        if policy.query_window and self._observer is not None:
            queries = self._observer.queries(place, index, policy.query_window)
        return Segments(
            num_partitions=count,
            first=first,
            lag=lag,
            layer=layer.index,
            num_heads=layer.cache.shape[1],
            device=layer.cache.device,
            keys=keys,
            values=values,
            queries=queries,
            scale=layer.scale,
        )

    def _count(self, request: PrunedRequest, policy: KVPolicy, before: int, after: int) -> None:
        lengths = request.lengths
        written = evicted = 0
        for stage, size in enumerate(self._shape.stage_sizes()):
            grown = lengths.written(after, stage) - lengths.written(before, stage)
            left = lengths.tokens_held(after, stage)
            written += size * grown
            evicted += size * (lengths.tokens_held(before, stage) + grown - left)
        self._stats.count_kv(policy.name, written, evicted)
