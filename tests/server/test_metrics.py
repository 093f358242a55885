"""Metrics as they stand on the page: counted requests, and figures fetched from the engine."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from tokenprune.lengths import PromptLayout
from tokenprune.policies import EngineShape
from tokenprune.request import make_plan, parse_pruning
from tokenprune.server.flops import ModelShape
from tokenprune.server.metrics import (
    ENGINE_FIGURES,
    EngineFigures,
    count_off,
    count_refused,
    count_served,
)
from tokenprune.server.metrics_page import MetricsPage
from tokenprune.server.usage import PromptRecord, RequestRecord

ENGINE = EngineShape(num_layers=8, boundaries=(0, 2, 3), max_num_batched_tokens=2048)
MODEL = ModelShape(hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, head_size=16)


def worker(kept: int, saved: int) -> dict[str, Any]:
    return {
        "op_seconds": {"score": {"count": 3, "sum": 0.6, "buckets": [1, 2]}},
        "bucket_bounds": [0.1, 0.3],
        "kv_bytes_saved": saved,
        "visual_tokens": {"uniform": {"seen": 100, "kept": kept}},
        "kv_tokens": {"lagkv": {"written": 7.5}},
        "kv_blocks_freed": {"lagkv": 3},
    }


@pytest.fixture
def registry() -> CollectorRegistry:
    figures = EngineFigures()
    # two data-parallel engines, the first one of two tensor-parallel ranks
    figures.update([[worker(25, 10), worker(25, 10)], [worker(50, 1)]])
    registry = CollectorRegistry()
    registry.register(figures)
    return registry


def test_engines_add_up_and_ranks_of_one_engine_do_not(registry: CollectorRegistry) -> None:
    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert value("tokenprune_visual_tokens_total", method="uniform", state="seen") == 200
    assert value("tokenprune_visual_tokens_total", method="uniform", state="kept") == 75
    assert value("tokenprune_kv_tokens_total", method="lagkv", state="written") == 15
    assert value("tokenprune_kv_blocks_freed_total", method="lagkv") == 6
    assert value("tokenprune_op_seconds_count", op="score") == 6
    assert value("tokenprune_op_seconds_sum", op="score") == pytest.approx(1.2)
    assert value("tokenprune_op_seconds_bucket", op="score", le="0.3") == 4
    assert value("tokenprune_op_seconds_bucket", op="score", le="+Inf") == 6


def test_bytes_saved_add_up_over_every_rank(registry: CollectorRegistry) -> None:
    assert registry.get_sample_value("tokenprune_kv_bytes_saved") == 21


def requests(visual: str, outcome: str) -> float:
    labels = {"visual": visual, "kv": "none", "channels": "none", "outcome": outcome}
    return REGISTRY.get_sample_value("tokenprune_requests_total", labels) or 0.0


@pytest.mark.parametrize(
    ("asked", "label"),
    [
        pytest.param("balanced", "transprune", id="preset"),
        pytest.param({"visual": {"method": "uniform", "keep_ratio": 7}}, "uniform", id="known"),
        pytest.param({"visual": {"method": "evil"}}, "none", id="unknown-makes-no-label"),
        pytest.param({"visual": {"method": ["x"]}}, "none", id="not-a-name"),
        pytest.param("no-such-preset", "none", id="unknown-preset"),
        pytest.param(5, "none", id="number"),
    ],
)
def test_refused_requests_are_counted_under_known_labels(asked: object, label: str) -> None:
    before = requests(label, "refused")
    count_refused(asked)
    assert requests(label, "refused") == before + 1


def test_served_requests_are_counted_with_their_flops() -> None:
    def flops(state: str) -> float:
        value = REGISTRY.get_sample_value("tokenprune_prefill_flops_total", {"state": state})
        return value or 0.0

    pruning = parse_pruning({"visual": {"method": "uniform"}})
    photo, text = PromptLayout(50, ((4, 44),)), PromptLayout(20)
    before = requests("uniform", "applied"), requests("uniform", "skipped")
    full, spent = flops("full"), flops("spent")
    for prompt in (photo, text):
        plan = make_plan(pruning, prompt, ENGINE)
        count_served(
            RequestRecord(pruning, prompts=[PromptRecord(plan, prompt, [1])]), ENGINE, MODEL
        )
    assert requests("uniform", "applied") == before[0] + 1
    assert requests("uniform", "skipped") == before[1] + 1
    assert 0 < flops("spent") - spent < flops("full") - full
    ratio = REGISTRY.get_sample_value("tokenprune_speedup_ratio", {"basis": "estimated"})
    assert ratio is not None
    assert ratio > 1


def test_unpruned_requests_are_counted_as_off() -> None:
    before = requests("none", "off")
    count_off()
    assert requests("none", "off") == before + 1


@pytest.fixture
def no_figures() -> Iterator[None]:
    yield
    ENGINE_FIGURES.update([])


def page(*fetches: Any) -> list[str]:
    async def render() -> list[str]:
        metrics = MetricsPage(REGISTRY)
        pages = []
        for fetch in fetches:
            metrics.fetch = fetch
            metrics._asked_at = float("-inf")
            pages.append(bytes((await metrics.render()).body).decode())
        return pages

    return asyncio.run(render())


@pytest.mark.usefixtures("no_figures")
def test_a_dead_engine_leaves_the_page_with_the_last_figures(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def alive() -> Any:
        return [[worker(25, 10)]]

    async def dead() -> Any:
        raise RuntimeError("engine is dead")

    first, second = page(alive, dead)
    line = 'tokenprune_visual_tokens_total{method="uniform",state="kept"} 25.0'
    assert line in first
    assert line in second
    assert "engine is dead" in caplog.text


@pytest.mark.usefixtures("no_figures")
def test_a_busy_engine_does_not_hold_the_page_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def busy() -> Any:
        await asyncio.sleep(60)

    monkeypatch.setattr("tokenprune.server.metrics_page._MAX_WAIT_SECONDS", 0.01)
    (shown,) = page(busy)
    assert "tokenprune_kv_bytes_saved" in shown
