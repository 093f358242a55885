"""Prunes KV channels of live requests: choice at the prompt's end, packed blocks, their attention.

After vLLM's attention, rows of requests with packed blocks are computed again over packed and
dense blocks; what vLLM wrote there is overwritten. In a full CUDA graph that kernel reads
persistent buffers only, so steps without a prompt's end stay compiled and captured.

Choice and packing run after the step's forward pass and after eviction, on its stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from tokenprune.engine.guard import PolicyGuard, checked
from tokenprune.engine.kv.cache_layers import MAX_READ, CacheLayer
from tokenprune.engine.kv.moved_rows import MovedRows
from tokenprune.engine.kv.query_observer import QueryObserver
from tokenprune.engine.stats import WorkerStats
from tokenprune.engine.step import PackingWork, PrunedRequest, PrunedStep, packing_due
from tokenprune.figures import Op
from tokenprune.kernels import ROW_FIELDS, pack, packed_decode_attention, places_of
from tokenprune.policies import ChannelInputs, ChannelPlan


@dataclass(slots=True)
class _Choice:
    """What was chosen in one layer.

    Attributes:
        places: `[R, H, 2 * D]` where elements of a packed token lie, by request.
        kept: Per request `[H, width]`, which elements its packed tokens keep.
    """

    places: Tensor
    kept: dict[int, Tensor] = field(default_factory=dict)


class ChannelPacker:
    """Prunes channels in the caches of one worker.

    Args:
        layers: Attention layers.
        observer: Observes their attention.
        num_stages: Stages of the engine.
        max_num_reqs: `R`, requests of the engine.
        stats: Where operations are timed.
        moved_rows: Where rows go that move in the step.
    """

    def __init__(
        self,
        layers: Sequence[CacheLayer],
        observer: QueryObserver,
        num_stages: int,
        max_num_reqs: int,
        stats: WorkerStats,
        moved_rows: MovedRows,
    ) -> None:
        self._stats = stats
        self._moved_rows = moved_rows
        self._layers = layers
        self._choices: dict[CacheLayer, _Choice] = {}
        for layer in layers:
            heads, _, full = layer.cache.shape[1:]
            places = layer.cache.new_zeros((max_num_reqs, heads, full), dtype=torch.int16)
            self._choices[layer] = _Choice(places)
        # -1: nothing to do
        self._persistent = torch.full(
            (num_stages, max_num_reqs, ROW_FIELDS),
            -1,
            dtype=torch.int32,
            device=layers[0].cache.device,
        )
        self._rows: list[Tensor | None] = [None] * num_stages
        self._observer = observer
        self._guard = PolicyGuard(stats)
        observer.overlay = self._attend

    @staticmethod
    def own_rows(step: PrunedStep, num_stages: int) -> np.ndarray | None:
        """Return how much vLLM's attention need read of rows with packed blocks.

        Returns:
            `[stages, num_reqs]` int32, the row's own tokens where it has packed blocks and the
            largest number elsewhere; None if no row has.
        """
        most = np.iinfo(np.int32).max
        limits = np.full((num_stages, len(step.requests)), most, dtype=np.int32)
        for place, request, before, after in step.pruned():
            packed = np.array(request.lengths.all_packed_blocks(before)) > 0
            limits[packed, place] = after - before
        return limits if (limits != most).any() else None

    def begin_step(self, step: PrunedStep) -> None:
        """Find the rows of the step that attend to packed blocks."""
        for stage in range(len(self._rows)):
            starts = step.starts(stage)
            rows: list[tuple[int, ...]] = []
            for place, request, before, _ in step.pruned():
                plan, lengths = request.plan.channels, request.lengths
                packed = lengths.packed_blocks(before, stage)
                if plan is None or not packed:
                    continue
                first, index = int(starts[place]), int(step.indices[place])
                dense = lengths.physical(before, stage) - packed * plan.packing.block
                # each row sees itself and what is before it
                rows += [
                    (row, index, packed, dense + row - first + 1, plan.width)
                    for row in range(first, int(starts[place + 1]))
                ]
            self._rows[stage] = None
            if rows:
                table = np.array(rows, dtype=np.int32)
                self._rows[stage] = async_tensor_h2d(table, device=self._persistent.device)

    def after_forward(self, step: PrunedStep) -> None:
        """Choose the channels of prompts that are complete, and pack what is due."""
        for place, request, before, after in step.pruned():
            if request.plan.channels is not None:
                index = int(step.indices[place])
                self._pack_request(request, request.plan.channels, index, before, after)

    def end_step(self) -> None:
        """Make layers run vLLM's attention alone again."""
        self._rows = [None] * len(self._rows)

    def persist(self, num_reqs: int) -> None:
        """Put the step's rows where a full CUDA graph of `num_reqs` requests reads them."""
        self._persistent.fill_(-1)
        for stage, rows in enumerate(self._rows):
            buffer = self._persistent[stage, :num_reqs]
            if rows is not None:
                buffer[: len(rows)].copy_(rows)
            self._rows[stage] = buffer

    def forget(self, index: int) -> None:
        """Drop what is known of a request."""
        for choice in self._choices.values():
            choice.kept.pop(index, None)

    def _attend(self, layer: CacheLayer, query: Tensor, cache: Tensor, out: Tensor) -> None:
        """Attend to packed blocks.

        Args:
            layer: The layer.
            query: `[num_rows, HQ, D]`, RoPE applied.
            cache: The layer's cache, which holds the step's keys and values already.
            out: Like `query`, with vLLM's result.
        """
        rows = self._rows[layer.stage]
        if rows is not None:
            packed_decode_attention(
                query,
                cache,
                layer.blocks,
                rows,
                self._choices[layer].places,
                out,
                scale=layer.attention.impl.scale,
                dense_order=layer.layout.order,
            )

    def _pack_request(
        self, request: PrunedRequest, plan: ChannelPlan, index: int, before: int, after: int
    ) -> None:
        chooses = request.ends_prompt(before, after)
        stages = range(len(self._rows))
        due = [packing_due(request.lengths, before, after, stage) for stage in stages]
        if not chooses and not any(due):
            return
        moved = set()
        for place, layer in enumerate(self._layers):
            if chooses:
                with self._stats.time(Op.CHANNEL_SELECT):
                    self._choose(layer, place, request, plan, index, after)
            work = due[layer.stage]
            if work is not None:
                moved.add(layer.group)
                with self._stats.time(Op.CHANNEL_PACK):
                    self._pack(layer, work, index)
        self._moved_rows.settle(index, moved)

    def _choose(
        self,
        layer: CacheLayer,
        place: int,
        request: PrunedRequest,
        plan: ChannelPlan,
        index: int,
        after: int,
    ) -> None:
        heads, full = layer.cache.shape[1], layer.cache.shape[3]
        # a prompt replayed after a preemption may come with tokens generated before
        generated = after - request.layout.num_tokens
        num_keys = max(1, request.lengths.tokens_held(after, layer.stage) - generated)

        def read() -> Iterator[tuple[Tensor, Tensor]]:
            at_once = max(1, MAX_READ // (heads * full))
            for begin in range(0, num_keys, at_once):
                end = min(num_keys, begin + at_once)
                yield layer.layout.read(layer.cache, layer.blocks[index], begin, end)

        queries = self._observer.queries(place, index, plan.policy.window)
        assert queries is not None, "a prompt ends with queries"
        inputs = ChannelInputs(queries, num_keys, read, layer.scale)
        keys = self._chosen(plan, plan.policy.select_keys, inputs, (heads, plan.keys))
        if plan.values < full // 2:
            values = self._chosen(plan, plan.policy.select_values, inputs, (heads, plan.values))
        else:
            values = _first(heads, plan.values, keys.device)
        choice = self._choices[layer]
        choice.kept[index] = torch.cat([keys, full // 2 + values], dim=1)
        choice.places[index] = places_of(choice.kept[index], full)

    def _chosen(
        self,
        plan: ChannelPlan,
        select: Callable[[ChannelInputs, int], Tensor],
        inputs: ChannelInputs,
        shape: tuple[int, int],
    ) -> Tensor:
        return self._guard.ask(
            plan.policy,
            lambda: checked(select(inputs, shape[1]), shape),
            lambda: _first(*shape, inputs.queries.device),
        )

    def _pack(self, layer: CacheLayer, work: PackingWork, index: int) -> None:
        cache, blocks = layer.cache, layer.blocks[index]
        heads, full = cache.shape[1], cache.shape[3]
        target = self._moved_rows.of(index, layer.group)
        target = blocks if target is None else target
        kept = self._choices[layer].kept[index]
        begin = work.first * work.block
        # a packed block lies before the tokens it is made of, and ends before those of the next
        at_once = max(1, MAX_READ // (heads * full * work.tokens))
        for done in range(0, work.count, at_once):
            count = min(at_once, work.count - done)
            raw = begin + done * work.tokens
            keys, values = layer.layout.read(cache, blocks, raw, raw + count * work.tokens)
            into = target[work.first + done : work.first + done + count].long()
            cache[into] = pack(torch.cat([keys, values], dim=2), kept, work.block)
        rest = begin + work.count * work.tokens
        newest = torch.arange(rest, work.end, device=cache.device)[None]
        layer.layout.move(cache, blocks, newest, begin + work.count * work.block, target)


def _first(heads: int, keep: int, device: torch.device) -> Tensor:
    """Return the first `keep` channels of every head, `[heads, keep]`."""
    return torch.arange(keep, device=device).expand(heads, -1)
