"""Every metric of the plugin: names, labels and help live here only.

What the API process knows by itself is counted in plain metrics. What only the engine's workers
know is fetched (see `metrics_page.py`) and shown by `EngineFigures`. Label values come from closed
sets, with `none` for "not asked for".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from tokenprune.policies import EngineShape, policies
from tokenprune.request import AXES, PRESETS, Axes
from tokenprune.server.flops import ModelShape, prefill_flops
from tokenprune.server.usage import RequestRecord

NONE = "none"

_REQUESTS = Counter(
    "tokenprune_requests_total",
    "HTTP requests by the method asked for on each axis and by outcome: off (nothing asked for), "
    "applied (on at least one axis), skipped (served unpruned), refused (HTTP 400). "
    "A rise of refused means clients send values this server cannot serve.",
    [*AXES, "outcome"],
)
_FALLBACK = Counter(
    "tokenprune_fallback_total",
    "Requests that asked for pruning on an axis and were served without it, by reason. "
    "A rise means that pruning is switched on where it cannot help.",
    ["axis", "reason"],
)
_FLOPS = Counter(
    "tokenprune_prefill_flops_total",
    "Prefill FLOPs of requests that asked for pruning, by formula: full is without pruning, spent "
    "is with it, scores included. The gap between the two growing means work saved.",
    ["state"],
)
# the newest process wins: ratios of several API processes cannot be added
_SPEEDUP = Gauge(
    "tokenprune_speedup_ratio",
    "Prefill work without pruning over work with it, of requests that asked for pruning, since "
    "start; estimated is by FLOPs. A rise means that more is saved; 1 means nothing is.",
    ["basis"],
    multiprocess_mode="mostrecent",
)
_OFF = _REQUESTS.labels(NONE, NONE, NONE, "off")


def count_off() -> None:
    """Count a request that did not ask for pruning."""
    _OFF.inc()


def count_refused(asked: object) -> None:
    """Count a request refused for what it `asked`: parsed axes, or the raw field as sent."""
    _REQUESTS.labels(*_methods(asked), "refused").inc()


def count_served(record: RequestRecord, engine: EngineShape, model: ModelShape) -> None:
    """Count a request that asked for pruning and is being answered."""
    applied = any(record.applied().values())
    outcome = "applied" if applied else "skipped"
    _REQUESTS.labels(*_methods(record.pruning), outcome).inc()
    for axis, reason in record.skipped().items():
        _FALLBACK.labels(axis, reason).inc()
    full = _FLOPS.labels("full")
    spent = _FLOPS.labels("spent")
    for entry in record.prompts:
        flops = prefill_flops(entry.plan, entry.prompt, engine, model)
        # every choice of a pruned prompt is prefilled by itself
        full.inc(flops[0] * len(entry.completions))
        spent.inc(flops[1] * len(entry.completions))
        _totals[0] += flops[0] * len(entry.completions)
        _totals[1] += flops[1] * len(entry.completions)
    if _totals[1]:
        _SPEEDUP.labels("estimated").set(_totals[0] / _totals[1])


_totals = [0, 0]


def _methods(asked: object) -> list[str]:
    if isinstance(asked, str):
        asked = PRESETS.get(asked)
    if isinstance(asked, Axes):
        asked = asked.model_dump()
    names = []
    for axis in AXES:
        choice = asked.get(axis) if isinstance(asked, Mapping) else None
        method = choice.get("method") if isinstance(choice, Mapping) else None
        names.append(method if isinstance(method, str) and method in policies(axis) else NONE)
    return names


class EngineFigures(Collector):
    """Shows the workers' cumulative figures, as last fetched."""

    def __init__(self) -> None:
        self._engines: Sequence[Sequence[Mapping[str, Any]]] = ()

    def update(self, engines: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Take new figures: per data-parallel engine, per worker."""
        self._engines = engines

    def collect(self) -> Iterator[Any]:
        """Yield the metric families."""
        # tensor-parallel ranks see the same tokens, so the first one speaks for its engine;
        # bytes are held by each rank for its own heads
        first = [workers[0] for workers in self._engines if workers]
        yield _token_counter(
            "tokenprune_visual_tokens",
            "Visual tokens of pruned prompts: seen reached the engine, kept survived the last "
            "cut. kept growing slower than seen means a deeper cut.",
            first,
            "visual_tokens",
        )
        yield _token_counter(
            "tokenprune_kv_tokens",
            "KV slots of pruned requests, as the mean over the layers. written growing faster "
            "than held memory means that tokens are evicted.",
            first,
            "kv_tokens",
        )
        freed = CounterMetricFamily(
            "tokenprune_kv_blocks_freed",
            "KV blocks given back to the pool by requests that were still running. A rise means "
            "room for more requests.",
            labels=["method"],
        )
        methods = sorted({m for figures in first for m in figures.get("kv_blocks_freed", {})})
        for method in methods:
            blocks = sum(figures.get("kv_blocks_freed", {}).get(method, 0) for figures in first)
            freed.add_metric([method], blocks)
        yield freed
        yield _op_histogram(first)
        yield GaugeMetricFamily(
            "tokenprune_kv_bytes_saved",
            "Bytes of KV cache that the requests running now do not hold thanks to pruning. "
            "A rise means room for more requests.",
            value=sum(w.get("kv_bytes_saved", 0) for workers in self._engines for w in workers),
        )


def _token_counter(
    name: str, documentation: str, engines: Iterable[Mapping[str, Any]], key: str
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, documentation, labels=["method", "state"])
    totals: dict[tuple[str, str], float] = {}
    for figures in engines:
        for method, states in figures.get(key, {}).items():
            for state, count in states.items():
                totals[method, state] = totals.get((method, state), 0) + count
    for labels, count in sorted(totals.items()):
        family.add_metric(labels, count)
    return family


def _op_histogram(engines: Iterable[Mapping[str, Any]]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(
        "tokenprune_op_seconds",
        "Seconds spent in one call of a pruning operation on the device. A rise means that "
        "pruning itself costs more.",
        labels=["op"],
    )
    totals: dict[str, tuple[list[float], list[int], float]] = {}
    for figures in engines:
        bounds = list(figures.get("bucket_bounds", ()))
        for op, data in figures.get("op_seconds", {}).items():
            counts = [*data["buckets"], data["count"]]
            _, known, seconds = totals.get(op, (bounds, [0] * len(counts), 0.0))
            summed = [a + b for a, b in zip(known, counts, strict=True)]
            totals[op] = (bounds, summed, seconds + data["sum"])
    for op, (bounds, counts, seconds) in sorted(totals.items()):
        buckets = list(zip([*(str(b) for b in bounds), "+Inf"], counts, strict=True))
        family.add_metric([op], buckets, sum_value=seconds)
    return family


ENGINE_FIGURES = EngineFigures()
REGISTRY.register(ENGINE_FIGURES)
