"""Counters of the worker; `reporting.py` takes them to the API processes."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from tokenprune.figures import BUCKET_SECONDS, KVTokens, Op, OpTimes, VisualTokens, WorkerFigures

# timings read after each call: more than come in, so that they cannot pile up while the device
# keeps pace, and few, so that no call pays for many others
_READ_PER_CALL = 2


@dataclass(slots=True)
class _Tally:
    """Calls of one op: those within each bucket, the last one without a bound, and their time."""

    calls: list[int] = field(default_factory=lambda: [0] * (len(BUCKET_SECONDS) + 1))
    seconds: float = 0.0

    def times(self) -> OpTimes:
        *buckets, count = accumulate(self.calls)
        return OpTimes(count, self.seconds, tuple(buckets))


class WorkerStats:
    """Measured op times and token counts since the engine started.

    On CUDA an op is timed by a pair of events. They are read once the device has passed them;
    nothing ever waits for it, so the newest timings can be missing from the figures of a step.
    """

    def __init__(self, device: torch.device, num_layers: int) -> None:
        self._num_layers = num_layers
        self._use_events = device.type == "cuda"
        # in the order of the device's stream, so the first one unfinished ends the reading
        self._pending: deque[tuple[Op, Any, Any]] = deque()
        self._ops: dict[Op, _Tally] = {}
        self._visual: dict[str, VisualTokens] = {}
        # summed over the layers
        self._kv: dict[str, tuple[int, int]] = {}
        self._freed: dict[str, int] = {}
        self._failures: dict[str, int] = {}

    @contextmanager
    def time(self, op: Op) -> Iterator[None]:
        """Time the body as one call of `op`."""
        if self._use_events:
            begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._pending.append((op, begin, end))
            self._read(_READ_PER_CALL)
        else:
            start = time.perf_counter()
            yield
            self._observe(op, time.perf_counter() - start)

    def count_visual(self, method: str, seen: int, kept: int) -> None:
        """Count the visual tokens of one prompt and those that survive its last cut."""
        counted = self._visual.get(method, VisualTokens())
        self._visual[method] = counted + VisualTokens(seen, kept)

    def count_kv(self, method: str, written: int, evicted: int) -> None:
        """Count the slots one request wrote and gave up in a step, summed over the layers."""
        before = self._kv.get(method, (0, 0))
        self._kv[method] = (before[0] + written, before[1] + evicted)

    def count_freed(self, method: str, blocks: int) -> None:
        """Count the blocks that went back to the pool while their request runs."""
        self._freed[method] = self._freed.get(method, 0) + blocks

    def count_failure(self, axis: str, method: str) -> None:
        """Count a call of a policy that failed, so that tokens were chosen without it."""
        name = f"{axis}/{method}"
        self._failures[name] = self._failures.get(name, 0) + 1

    def _observe(self, op: Op, seconds: float) -> None:
        tally = self._ops.setdefault(op, _Tally())
        tally.calls[bisect_left(BUCKET_SECONDS, seconds)] += 1
        tally.seconds += seconds

    def _read(self, most: int) -> None:
        for _ in range(min(most, len(self._pending))):
            op, begin, end = self._pending[0]
            if not end.query():
                return
            self._pending.popleft()
            self._observe(op, begin.elapsed_time(end) / 1000)

    def figures(self, kv_bytes_saved: int = 0) -> WorkerFigures:
        """Return all figures as they stand, with the bytes that only the caller knows."""
        self._read(len(self._pending))
        layers = self._num_layers
        return WorkerFigures(
            ops={op: tally.times() for op, tally in self._ops.items()},
            visual_tokens=dict(self._visual),
            kv_tokens={
                method: KVTokens(written / layers, evicted / layers)
                for method, (written, evicted) in self._kv.items()
            },
            kv_blocks_freed=dict(self._freed),
            failures=dict(self._failures),
            kv_bytes_saved=kv_bytes_saved,
        )
