"""Prunes KV channels of live requests: choice at the prompt's end, packed blocks, their attention.

The attention implementation of every layer is replaced by one that runs vLLM's own first. After
it, queries that end a prompt are kept for the choice, and rows of requests with packed blocks are
computed again over packed and dense blocks; what vLLM wrote there is overwritten. Attention is
outside the compiled code, and in a full CUDA graph its kernel reads persistent buffers only, so
steps without a prompt's end stay compiled and captured.

Choice and packing run after the step's forward pass and after eviction, on its stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, no_type_check

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from tokenprune.engine.cache_layout import CacheLayout
from tokenprune.engine.compaction import MAX_READ, Compactor
from tokenprune.engine.stats import WorkerStats
from tokenprune.engine.step import DuePacking, PrunedRequest, due_packing, window_rows
from tokenprune.figures import Op
from tokenprune.kernels import ROW_FIELDS, pack, packed_decode_attention, places_of
from tokenprune.policies import ChannelInputs, ChannelPolicy


@dataclass(slots=True)
class _Layer:
    """One attention layer.

    Attributes:
        blocks: `[R, m]` block tables by request.
        places: `[R, H, 2 * D]` where elements of a packed token lie, by request.
        windows: Per request the queries of its last prompt rows so far.
        kept: Per request `[H, width]`, which elements its packed tokens keep.
    """

    stage: int
    attention: Any
    layout: CacheLayout
    blocks: Tensor
    places: Tensor
    windows: dict[int, list[Tensor]] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)


class ChannelPruner:
    """Prunes channels in the caches of one worker.

    Args:
        compactor: Knows the caches and how their rows lie.
        names: Per stage and group its layers.
        block_tables: vLLM's block tables.
        layers: Attention layers by name.
        max_num_reqs: `R`, requests of the engine.
        stats: Where operations are timed.
    """

    def __init__(
        self,
        compactor: Compactor,
        names: Sequence[Sequence[tuple[int, list[str]]]],
        block_tables: Any,
        layers: dict[str, Any],
        max_num_reqs: int,
        stats: WorkerStats,
    ) -> None:
        self._stats = stats
        self._layers: list[_Layer] = []
        for stage, groups in enumerate(names):
            for group, members in groups:
                for name in members:
                    attention = layers[name]
                    heads, _, full = attention.kv_cache.shape[1:]
                    layer = _Layer(
                        stage=stage,
                        attention=attention,
                        layout=compactor.layouts[name],
                        blocks=block_tables.block_tables[group].gpu,
                        places=attention.kv_cache.new_zeros(
                            (max_num_reqs, heads, full), dtype=torch.int16
                        ),
                    )
                    self._layers.append(layer)
                    attention.impl = _observed(attention.impl, self, layer)
        device = self._layers[0].places.device
        num_stages = len(names)
        # -1: nothing to do
        self._persistent = torch.full(
            (num_stages, max_num_reqs, ROW_FIELDS), -1, dtype=torch.int32, device=device
        )
        self._rows: list[Tensor | None] = [None] * num_stages
        self._windows: list[list[tuple[int, slice]]] = [[] for _ in range(num_stages)]

    def begin_step(
        self,
        requests: Sequence[PrunedRequest | None],
        indices: NDArray[Any],
        computed: NDArray[Any],
        starts: Sequence[NDArray[Any]],
        scheduled: NDArray[Any],
    ) -> None:
        """Find the rows of a step that end a prompt, or attend to packed blocks.

        Args:
            requests: `[num_reqs]` the pruned requests of the batch, None for the others.
            indices: `[num_reqs]` their rows in the block tables.
            computed: `[num_reqs]` tokens computed before the step.
            starts: Per stage, `[num_reqs + 1]` where the rows of each begin.
            scheduled: `[num_reqs]` tokens of the step.
        """
        for stage, begins in enumerate(starts):
            rows: list[tuple[int, ...]] = []
            windows: list[tuple[int, slice]] = []
            for i, request in enumerate(requests):
                if request is None or request.plan.channels is None:
                    continue
                index, before, first = int(indices[i]), int(computed[i]), int(begins[i])
                window = window_rows(request, before, before + int(scheduled[i]), stage)
                if window:
                    windows.append((index, slice(first + window.start, first + window.stop)))
                lengths = request.plan.channels.lengths
                assert lengths.packing is not None
                packed = lengths.packed_blocks(before, stage)
                if packed:
                    dense = lengths.physical(before, stage) - packed * lengths.packing.block
                    width = request.plan.channels.width
                    # each row sees itself and what is before it
                    rows += [
                        (row, index, packed, dense + row - first + 1, width)
                        for row in range(first, int(begins[i + 1]))
                    ]
            self._windows[stage] = windows
            self._rows[stage] = None
            if rows:
                table = np.array(rows, dtype=np.int32)
                self._rows[stage] = async_tensor_h2d(table, device=self._persistent.device)

    def end_step(self) -> None:
        """Make layers run vLLM's attention alone again."""
        for stage in range(len(self._rows)):
            self._rows[stage] = None
            self._windows[stage] = []

    def persist(self, num_reqs: int) -> None:
        """Put the step's rows where a full CUDA graph of `num_reqs` requests reads them."""
        self._persistent.fill_(-1)
        for stage, rows in enumerate(self._rows):
            buffer = self._persistent[stage, :num_reqs]
            if rows is not None:
                buffer[: len(rows)].copy_(rows)
            self._rows[stage] = buffer

    def after_attention(self, layer: _Layer, query: Tensor, cache: Tensor, out: Tensor) -> None:
        """Keep the queries that end a prompt; attend to packed blocks.

        Args:
            layer: The layer.
            query: `[num_rows, HQ, D]`, RoPE applied.
            cache: The layer's cache, which holds the step's keys and values already.
            out: Like `query`, with vLLM's result.
        """
        for index, rows in self._windows[layer.stage]:
            layer.windows.setdefault(index, []).append(query[rows].clone())
        rows_to_attend = self._rows[layer.stage]
        if rows_to_attend is not None:
            packed_decode_attention(
                query,
                cache,
                layer.blocks,
                rows_to_attend,
                layer.places,
                out,
                scale=layer.attention.impl.scale,
                dense_order=layer.layout.order,
            )

    def finish(self, request: PrunedRequest, index: int, before: int, after: int) -> None:
        """Choose the channels of a prompt that is complete, and pack what is due.

        Args:
            request: The request.
            index: Its row in the block tables.
            before: Tokens computed before the step.
            after: Tokens computed after it.
        """
        chooses = before < request.layout.num_tokens <= after
        due = [due_packing(request, before, after, stage) for stage in range(len(self._rows))]
        if not chooses and not any(due):
            return
        for layer in self._layers:
            if chooses:
                with self._stats.time(Op.CHANNEL_SELECT):
                    self._choose(layer, request, index, after)
            work = due[layer.stage]
            if work is not None:
                with self._stats.time(Op.CHANNEL_PACK):
                    self._pack(layer, work, index)

    def forget(self, index: int) -> None:
        """Drop what is known of a request."""
        for layer in self._layers:
            layer.windows.pop(index, None)
            layer.kept.pop(index, None)

    def _choose(self, layer: _Layer, request: PrunedRequest, index: int, after: int) -> None:
        plan, policy = request.plan.channels, request.plan.pruning.policy("channels")
        assert plan is not None
        assert isinstance(policy, ChannelPolicy)
        cache = layer.attention.kv_cache
        heads, full = cache.shape[1], cache.shape[3]
        # a prompt replayed after a preemption may come with tokens generated before
        generated = after - request.layout.num_tokens
        num_keys = max(1, plan.lengths.held(after, layer.stage) - generated)

        def read() -> Iterator[tuple[Tensor, Tensor]]:
            at_once = max(1, MAX_READ // (heads * full))
            for begin in range(0, num_keys, at_once):
                end = min(num_keys, begin + at_once)
                yield layer.layout.read(cache, layer.blocks[index], begin, end)

        queries = torch.cat(layer.windows.pop(index)).transpose(0, 1)
        inputs = ChannelInputs(queries, num_keys, read, float(layer.attention.impl.scale))
        keys = policy.select_keys(inputs, plan.keys)
        if plan.values < full // 2:
            values = policy.select_values(inputs, plan.values)
        else:
            values = torch.arange(plan.values, device=keys.device).expand(heads, -1)
        layer.kept[index] = torch.cat([keys, full // 2 + values], dim=1)
        layer.places[index] = places_of(layer.kept[index], full)

    def _pack(self, layer: _Layer, work: DuePacking, index: int) -> None:
        cache, blocks = layer.attention.kv_cache, layer.blocks[index]
        heads, full = cache.shape[1], cache.shape[3]
        begin = work.first * work.block
        # a packed block lies before the tokens it is made of, and ends before those of the next
        at_once = max(1, MAX_READ // (heads * full * work.tokens))
        for done in range(0, work.count, at_once):
            count = min(at_once, work.count - done)
            raw = begin + done * work.tokens
            keys, values = layer.layout.read(cache, blocks, raw, raw + count * work.tokens)
            into = blocks[work.first + done : work.first + done + count].long()
            cache[into] = pack(torch.cat([keys, values], dim=2), layer.kept[index], work.block)
        rest = begin + work.count * work.tokens
        newest = torch.arange(rest, work.end, device=cache.device)[None]
        layer.layout.move(cache, blocks, newest, begin + work.count * work.block)


def _observed(impl: Any, pruner: ChannelPruner, layer: _Layer) -> Any:
    """Return a copy of an attention implementation that calls `after_attention`."""
    # to measure its graphs vLLM makes a cache, and a pruner, before the one it serves from
    impl = getattr(impl, "unobserved", impl)
    own = type(impl)

    @no_type_check
    def forward(self, layer_module, query, key, value, kv_cache, attn_metadata, *args, **kwargs):
        result = own.forward(
            self, layer_module, query, key, value, kv_cache, attn_metadata, *args, **kwargs
        )
        if attn_metadata is not None:
            out = kwargs["output"] if "output" in kwargs else args[0]
            pruner.after_attention(layer, query, kv_cache, out)
        return result

    observed = type(f"Observed{own.__name__}", (own,), {"forward": forward})
    copy: Any = object.__new__(observed)
    copy.__dict__.update(impl.__dict__, unobserved=impl)
    return copy
