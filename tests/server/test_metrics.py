"""Metrics as they stand on the page: counted requests, and figures the engine sends."""

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    generate_latest,
)

from tokenprune.figures import BUCKET_SECONDS, KVTokens, Op, OpTimes, VisualTokens, WorkerFigures
from tokenprune.lengths import PromptLayout
from tokenprune.plan import make_plan
from tokenprune.policies import methods
from tokenprune.request import parse_pruning
from tokenprune.server.metrics import (
    ENGINE_FIGURES,
    EngineFigures,
    count_off,
    count_refused,
    count_served,
)
from tokenprune.server.metrics_page import attach_metrics_page
from tokenprune.server.usage import PromptRecord, RequestRecord
from tokenprune.shape import EngineShape, ModelShape

ENGINE = EngineShape(num_layers=8, boundaries=(0, 2, 3), max_num_batched_tokens=2048)
MODEL = ModelShape(hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, head_size=16)


def engine(kept: int, saved: int) -> str:
    return WorkerFigures(
        ops={Op.SELECT: OpTimes(3, 0.6, (*(0 for _ in BUCKET_SECONDS[:-2]), 2, 3))},
        visual_tokens={"uniform": VisualTokens(seen=100, kept=kept)},
        kv_tokens={"lagkv": KVTokens(written=7.5)},
        kv_blocks_freed={"lagkv": 3},
        kv_bytes_saved=saved,
    ).to_json()


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


@pytest.fixture
def figures() -> EngineFigures:
    return EngineFigures()


@pytest.fixture
def registry(figures: EngineFigures) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(figures)
    return registry


def test_engines_add_up(figures: EngineFigures, registry: CollectorRegistry) -> None:
    figures.take(0, engine(25, 20))
    figures.take(1, engine(50, 1))
    assert value(registry, "tokenprune_visual_tokens_total", method="uniform", state="seen") == 200
    assert value(registry, "tokenprune_visual_tokens_total", method="uniform", state="kept") == 75
    assert value(registry, "tokenprune_kv_tokens_total", method="lagkv", state="written") == 15
    assert value(registry, "tokenprune_kv_blocks_freed_total", method="lagkv") == 6
    assert value(registry, "tokenprune_op_seconds_count", op="select") == 6
    assert value(registry, "tokenprune_op_seconds_sum", op="select") == pytest.approx(1.2)
    assert value(registry, "tokenprune_op_seconds_bucket", op="select", le="0.5") == 4
    assert value(registry, "tokenprune_op_seconds_bucket", op="select", le="+Inf") == 6
    assert value(registry, "tokenprune_kv_bytes_saved") == 21


def test_an_engine_s_new_figures_replace_its_old_ones(
    figures: EngineFigures, registry: CollectorRegistry
) -> None:
    figures.take(0, engine(25, 20))
    figures.take(0, engine(30, 5))
    assert value(registry, "tokenprune_visual_tokens_total", method="uniform", state="kept") == 30
    assert value(registry, "tokenprune_kv_bytes_saved") == 5


def test_the_last_figures_stay_when_no_more_arrive(
    figures: EngineFigures, registry: CollectorRegistry
) -> None:
    figures.take(0, engine(25, 20))
    line = b'tokenprune_visual_tokens_total{method="uniform",state="kept"} 25.0'
    assert [line in generate_latest(registry) for _ in range(3)] == [True] * 3


def test_every_label_is_on_the_page_before_anything_happened(registry: CollectorRegistry) -> None:
    for op in Op:
        assert value(registry, "tokenprune_op_seconds_count", op=op) == 0
        assert value(registry, "tokenprune_op_seconds_bucket", op=op, le="+Inf") == 0
    for method in methods("visual"):
        for state in ("seen", "kept"):
            labels = {"method": method, "state": state}
            assert value(registry, "tokenprune_visual_tokens_total", **labels) == 0
    for method in methods("kv"):
        for state in ("written", "evicted"):
            assert value(registry, "tokenprune_kv_tokens_total", method=method, state=state) == 0
    for method in ("lagkv", "think", "lagkv+think"):
        assert value(registry, "tokenprune_kv_blocks_freed_total", method=method) == 0
    for state in ("full", "spent"):
        assert value(REGISTRY, "tokenprune_prefill_flops_total", state=state) is not None


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


def test_with_one_api_process_the_page_stays_vllms() -> None:
    app = FastAPI()
    before = len(app.routes)
    attach_metrics_page(app, REGISTRY)
    assert len(app.routes) == before
    assert ENGINE_FIGURES in set(REGISTRY._collector_to_names)


def test_with_several_api_processes_the_page_adds_the_figures_to_the_files() -> None:
    app, files = FastAPI(), CollectorRegistry()
    Counter("of_all_processes", "Stands for what vLLM reads from files.", registry=files)
    attach_metrics_page(app, files)
    answer = TestClient(app).get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == CONTENT_TYPE_LATEST
    assert "of_all_processes_total 0.0" in answer.text
    assert "tokenprune_kv_bytes_saved" in answer.text
    assert "tokenprune_requests_total" not in answer.text, "it is in the files already"
