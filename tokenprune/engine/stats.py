"""Counters of the worker, read by the API process through `collective_rpc`."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

BUCKET_BOUNDS = (1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1.0)


class WorkerStats:
    """Measured op times and token counts since the engine started.

    On CUDA an op is timed by a pair of events, which are read when the figures are asked for;
    nothing waits for the device while a request is served.
    """

    def __init__(self, device: torch.device, num_layers: int) -> None:
        self._num_layers = num_layers
        self._use_events = device.type == "cuda"
        self._pending: list[tuple[str, Any, Any]] = []
        self._ops: dict[str, dict[str, Any]] = {}
        self._visual: dict[str, dict[str, int]] = {}
        self._kv: dict[str, dict[str, int]] = {}
        self._freed: dict[str, int] = {}

    @contextmanager
    def time(self, op: str) -> Iterator[None]:
        """Time the body as one call of `op`."""
        if self._use_events:
            begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._pending.append((op, begin, end))
            if len(self._pending) > 4096:
                self._settle(wait=False)
        else:
            start = time.perf_counter()
            yield
            self._observe(op, time.perf_counter() - start)

    def count_visual(self, method: str, seen: int, kept: int) -> None:
        """Count the visual tokens of one prompt and those that survive its last cut."""
        counts = self._visual.setdefault(method, {"seen": 0, "kept": 0})
        counts["seen"] += seen
        counts["kept"] += kept

    def count_kv(self, method: str, written: int, evicted: int) -> None:
        """Count the slots one request wrote and gave up in a step, summed over the layers."""
        counts = self._kv.setdefault(method, {"written": 0, "evicted": 0})
        counts["written"] += written
        counts["evicted"] += evicted

    def count_freed(self, method: str, blocks: int) -> None:
        """Count the blocks that went back to the pool while their request runs."""
        self._freed[method] = self._freed.get(method, 0) + blocks

    def _observe(self, op: str, seconds: float) -> None:
        entry = self._ops.setdefault(
            op, {"count": 0, "sum": 0.0, "buckets": [0] * len(BUCKET_BOUNDS)}
        )
        entry["count"] += 1
        entry["sum"] += seconds
        for i in range(bisect_left(BUCKET_BOUNDS, seconds), len(BUCKET_BOUNDS)):
            entry["buckets"][i] += 1

    def _settle(self, *, wait: bool) -> None:
        waiting = []
        for op, begin, end in self._pending:
            if wait:
                end.synchronize()
            if wait or end.query():
                self._observe(op, begin.elapsed_time(end) / 1000)
            else:
                waiting.append((op, begin, end))
        self._pending = waiting

    def snapshot(self) -> dict[str, Any]:
        """Return all figures as plain data."""
        self._settle(wait=True)
        return {
            "op_seconds": {op: {**v, "buckets": list(v["buckets"])} for op, v in self._ops.items()},
            "bucket_bounds": list(BUCKET_BOUNDS),
            "visual_tokens": {method: dict(v) for method, v in self._visual.items()},
            "kv_tokens": {
                method: {state: count / self._num_layers for state, count in v.items()}
                for method, v in self._kv.items()
            },
            "kv_blocks_freed": dict(self._freed),
        }
