"""Observes attention: keeps the queries that end a prompt, for KV and channel methods alike.

The attention implementation of every layer is replaced by one that runs vLLM's own first. After
it, queries that end a prompt are kept, and whoever attends to more than vLLM knows of (packed
blocks) writes its part of the result. Attention is outside the compiled code; a step whose
queries are kept runs outside CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, no_type_check

import torch
from torch import Tensor

from tokenprune.engine.kv.cache_layers import CacheLayer
from tokenprune.engine.step import PrunedStep, window_rows

# called with layer, queries, cache and vLLM's result after each layer's attention
Overlay = Callable[[CacheLayer, Tensor, Tensor, Tensor], None]


class QueryObserver:
    """Observes the attention layers of one worker.

    Attributes:
        overlay: Called after each layer's attention, or None.

    Args:
        layers: The layers.
        num_stages: Stages of the engine.
    """

    def __init__(self, layers: Sequence[CacheLayer], num_stages: int) -> None:
        self.overlay: Overlay | None = None
        # per stage, the request's row in the tables and its rows of the step
        self._windows: list[list[tuple[int, slice]]] = [[] for _ in range(num_stages)]
        self._queries: list[dict[int, list[Tensor]]] = []
        for place, layer in enumerate(layers):
            self._queries.append({})
            layer.attention.impl = _observed(layer, self._after_attention, place)

    def begin_step(self, step: PrunedStep) -> None:
        """Find the rows of the step that end a prompt."""
        for stage, windows in enumerate(self._windows):
            windows.clear()
            starts = step.starts(stage)
            for place, request, before, after in step.pruned():
                rows = window_rows(request, before, after, stage)
                if rows:
                    first = int(starts[place])
                    index = int(step.indices[place])
                    windows.append((index, slice(first + rows.start, first + rows.stop)))

    def after_forward(self, step: PrunedStep) -> None:
        """Drop queries that nobody looks at again: channels are chosen once, tokens often."""
        for place, request, before, after in step.pruned():
            kv = request.plan.kv
            if request.ends_prompt(before, after) and (kv is None or not kv.policy.query_window):
                self.forget(int(step.indices[place]))

    def end_step(self) -> None:
        """Keep no more queries."""
        for windows in self._windows:
            windows.clear()

    def queries(self, place: int, index: int, window: int) -> Tensor | None:
        """Return the last queries of a prompt.

        Args:
            place: Place of the layer among the worker's.
            index: The request's row in the tables.
            window: Most rows to return.

        Returns:
            `[HQ, W, D]`, RoPE applied; None before there are any.
        """
        kept = self._queries[place].get(index)
        return None if not kept else torch.cat(kept)[-window:].transpose(0, 1)

    def forget(self, index: int) -> None:
        """Drop the queries of a request."""
        for kept in self._queries:
            kept.pop(index, None)

    def _after_attention(
        self, layer: CacheLayer, place: int, query: Tensor, cache: Tensor, out: Tensor
    ) -> None:
        for index, rows in self._windows[layer.stage]:
            self._queries[place].setdefault(index, []).append(query[rows].clone())
        if self.overlay is not None:
            self.overlay(layer, query, cache, out)


def _observed(layer: CacheLayer, after_attention: Callable[..., None], place: int) -> Any:
    """Return a copy of a layer's attention implementation that calls `after_attention`."""
    # to measure its graphs vLLM makes a cache, and an observer, before the one it serves from
    impl = getattr(layer.attention.impl, "unobserved", layer.attention.impl)
    own = type(impl)

    @no_type_check
    def forward(self, layer_module, query, key, value, kv_cache, attn_metadata, *args, **kwargs):
        result = own.forward(
            self, layer_module, query, key, value, kv_cache, attn_metadata, *args, **kwargs
        )
        if attn_metadata is not None:
            out = kwargs["output"] if "output" in kwargs else args[0]
            after_attention(layer, place, query, kv_cache, out)
        return result

    observed = type(f"Observed{own.__name__}", (own,), {"forward": forward})
    copy: Any = object.__new__(observed)
    copy.__dict__.update(impl.__dict__, unobserved=impl)
    return copy
