"""A policy that raises, or answers in another shape, hurts its own request alone."""

import logging

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from tests.engine.kv.caches import (
    attention_layer,
    layers_of,
    moved_rows_of,
    named,
    random_table,
    rows_of,
    step_of,
)
from tokenprune.engine.guard import PolicyGuard, checked, evenly
from tokenprune.engine.kv.evictor import Evictor
from tokenprune.engine.stats import WorkerStats
from tokenprune.engine.step import PrunedRequest
from tokenprune.lengths import PromptLayout
from tokenprune.plan import make_plan
from tokenprune.policies.kv.lagkv import LagKV
from tokenprune.policies.visual.uniform import UniformVisual
from tokenprune.request import parse_pruning
from tokenprune.shape import EngineShape


@pytest.fixture
def stats():
    return WorkerStats(torch.device("cpu"), 2)


def fail():
    raise RuntimeError("no idea")


def test_an_answer_is_passed_on_and_nothing_is_counted(stats):
    assert PolicyGuard(stats).ask(LagKV(), lambda: 5, fail) == 5
    assert stats.figures().failures == {}


def test_every_failure_is_counted_and_the_first_of_a_method_is_logged(stats, caplog):
    guard = PolicyGuard(stats)
    with caplog.at_level(logging.ERROR):
        assert [guard.ask(LagKV(), fail, lambda: 7) for _ in range(3)] == [7, 7, 7]
        assert guard.ask(UniformVisual(), fail, lambda: 8) == 8
    assert stats.figures().failures == {"kv/lagkv": 3, "visual/uniform": 1}
    assert [record.args for record in caplog.records] == [("kv", "lagkv"), ("visual", "uniform")]
    assert "no idea" in caplog.text


@pytest.mark.parametrize(
    "result",
    [torch.zeros(2, 4), torch.zeros(3), None, [0, 1, 2]],
    ids=["larger", "flat", "none", "list"],
)
def test_a_result_of_another_shape_is_a_failure(result):
    with pytest.raises(ValueError, match=r"of shape \[2, 3\], got"):
        checked(result, (2, 3))


@pytest.mark.parametrize(("total", "keep"), [(1, 1), (7, 3), (7, 7), (576, 100)])
def test_even_distances_give_as_many_as_were_planned(total, keep):
    kept = evenly(total, keep, torch.device("cpu")).tolist()
    assert len(kept) == keep
    assert kept == sorted(set(kept))
    assert kept[0] >= 0
    assert kept[-1] < total


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda segments: fail(), id="raises"),
        pytest.param(lambda segments: torch.zeros(2, 3), id="another-shape"),
        pytest.param(lambda segments: torch.full((2, 4, 16), torch.nan), id="nan"),
    ],
)
def test_a_scorer_that_fails_leaves_as_many_rows_as_were_planned(monkeypatch, stats, answer):
    monkeypatch.setattr(LagKV, "score", lambda self, segments: answer(segments))
    n = 2 + 16 * 5 + 15
    shape = EngineShape(1, (0,), 4096)
    asked = parse_pruning({"kv": {"method": "lagkv", "sink": 2, "lag": 16, "keep_ratio": 0.5}})
    request = PrunedRequest("r", PromptLayout(n), make_plan(asked, PromptLayout(n), shape))
    generator = torch.Generator().manual_seed(1)
    cache = torch.randn(40, 2, 4, 8, generator=generator)
    layer = attention_layer("TRITON_ATTN", cache, impl=type("Impl", (), {"scale": 1.0}))
    table = random_table(40, generator)
    old = rows_of(cache, table[0])
    evictor = Evictor(layers_of(named([layer]), table, 4), shape, stats, moved_rows_of(table))
    evictor.after_forward(step_of(request, 0, 0, n))
    held = request.lengths.physical(n, 0)
    new = rows_of(cache, table[0])[:, :held]
    for head in range(2):
        kept = [next(i for i in range(n) if torch.equal(old[head, i], row)) for row in new[head]]
        assert kept == sorted(set(kept))
        assert kept[:2] == [0, 1]
        assert kept[-31:] == list(range(n - 31, n))
        assert [sum(2 + 16 * p <= i < 18 + 16 * p for i in kept) for p in range(4)] == [8] * 4
