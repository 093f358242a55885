"""Every metric of the plugin: names, labels and help live here only.

What the API process knows by itself is counted in plain metrics. What only the engine's workers
know arrives with the results of its steps (see `engine/reporting.py`) and is shown by
`EngineFigures`. Label values come from closed sets, with `none` for "not asked for".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from tokenprune.cost import prefill_flops
from tokenprune.figures import BUCKET_SECONDS, KVTokens, Op, OpTimes, VisualTokens, WorkerFigures
from tokenprune.policies import AXES, methods
from tokenprune.request import PRESETS, Axes
from tokenprune.server.usage import RequestRecord
from tokenprune.shape import EngineShape, ModelShape

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
_FULL, _SPENT = _FLOPS.labels("full"), _FLOPS.labels("spent")


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
    for entry in record.prompts:
        plan, visual = entry.plan, entry.plan.visual
        scores = 0
        if visual is not None:
            scores = visual.policy.score_macs(visual, entry.prompt, engine, model)
        flops = prefill_flops(plan.lengths, engine, model, scores)
        # as if every choice were prefilled by itself: what the prefix cache brings is in neither
        _FULL.inc(flops[0] * len(entry.completions))
        _SPENT.inc(flops[1] * len(entry.completions))
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
        names.append(method if isinstance(method, str) and method in methods(axis) else NONE)
    return names


class EngineFigures(Collector):
    """Shows the engines' figures as they last arrived."""

    def __init__(self) -> None:
        self._engines: dict[int, str] = {}

    def take(self, engine: int, figures: str) -> None:
        """Take new figures of a data-parallel engine; they are read when somebody looks."""
        self._engines[engine] = figures

    def collect(self) -> Iterator[Any]:
        """Yield the metric families."""
        # the page may be rendered in another thread than `take` runs in
        engines = [WorkerFigures.from_json(text) for text in list(self._engines.values())]
        yield _token_counter(
            "tokenprune_visual_tokens",
            "Visual tokens of pruned prompts: seen reached the engine, kept survived the last "
            "cut. kept growing slower than seen means a deeper cut.",
            _total((e.visual_tokens for e in engines), dict.fromkeys(_VISUAL, VisualTokens())),
        )
        yield _token_counter(
            "tokenprune_kv_tokens",
            "KV slots of pruned requests, as the mean over the layers; what the prefix cache "
            "brought is not among written. written growing faster "
            "than held memory means that tokens are evicted.",
            _total((e.kv_tokens for e in engines), dict.fromkeys(_KV, KVTokens())),
        )
        freed = CounterMetricFamily(
            "tokenprune_kv_blocks_freed",
            "KV blocks given back to the pool by requests that were still running. A rise means "
            "room for more requests.",
            labels=["method"],
        )
        blocks = _total((e.kv_blocks_freed for e in engines), dict.fromkeys(_FREEING, 0))
        for method, count in blocks.items():
            freed.add_metric([method], count)
        yield freed
        times = HistogramMetricFamily(
            "tokenprune_op_seconds",
            "Seconds spent in one call of a pruning operation on the device. A rise means that "
            "pruning itself costs more.",
            labels=["op"],
        )
        for op, calls in _total((e.ops for e in engines), dict.fromkeys(Op, OpTimes())).items():
            buckets = zip(_BOUNDS, [*calls.buckets, calls.count], strict=True)
            times.add_metric([op.value], [*buckets], sum_value=calls.seconds)
        yield times
        failures = CounterMetricFamily(
            "tokenprune_policy_failures",
            "Calls of a method that raised, or returned something of another shape; the tokens "
            "were chosen without it. Any rise is a fault of the method: see the engine's log.",
            labels=["axis", "method"],
        )
        for name, count in _total((e.failures for e in engines), dict.fromkeys(_ALL, 0)).items():
            failures.add_metric(name.split("/"), count)
        yield failures
        yield GaugeMetricFamily(
            "tokenprune_kv_bytes_saved",
            "Bytes of KV cache that the requests running now do not hold thanks to pruning. "
            "A rise means room for more requests.",
            value=sum(e.kv_bytes_saved for e in engines),
        )


_VISUAL, _KV = sorted(methods("visual")), sorted(methods("kv"))
# a request's blocks are emptied by its KV method, its channel method, or both
_FREEING = sorted(
    [
        *_KV,
        *methods("channels"),
        *(f"{kv}+{channels}" for kv in _KV for channels in methods("channels")),
    ]
)
_ALL = [f"{axis}/{method}" for axis in AXES for method in methods(axis)]
_BOUNDS = [*(str(bound) for bound in BUCKET_SECONDS), "+Inf"]

_Label = TypeVar("_Label", bound=str)
_Figure = TypeVar("_Figure", int, OpTimes, VisualTokens, KVTokens)


def _total(
    engines: Iterable[Mapping[_Label, _Figure]], start: dict[_Label, _Figure]
) -> dict[_Label, _Figure]:
    for figures in engines:
        for label, figure in figures.items():
            start[label] = start[label] + figure if label in start else figure
    return start


def _token_counter(
    name: str, documentation: str, totals: Mapping[str, VisualTokens | KVTokens]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, documentation, labels=["method", "state"])
    for method, counts in totals.items():
        for state, count in asdict(counts).items():
            family.add_metric([method, state], count)
    return family


ENGINE_FIGURES = EngineFigures()
REGISTRY.register(ENGINE_FIGURES)
