"""Whole evictions by hand: which rows stay, and where they move."""

import types

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
from tokenprune.engine.kv.evictor import Evictor
from tokenprune.engine.stats import WorkerStats
from tokenprune.engine.step import PrunedRequest, eviction_due
from tokenprune.errors import ConfigurationError
from tokenprune.kernels import lag_keep
from tokenprune.lengths import PromptLayout
from tokenprune.plan import make_plan
from tokenprune.policies import Segments
from tokenprune.request import parse_pruning
from tokenprune.shape import EngineShape

# the shortest legal partition
L = 16


class Bench:
    """An evictor over two layers in one group."""

    def __init__(self, method, n, **parameters):
        kv = {"method": method, "sink": 2, "lag": L, "keep_ratio": 0.5, **parameters}
        layout = PromptLayout(n)
        shape = EngineShape(2, (0,), 4096)
        plan = make_plan(parse_pruning({"kv": kv}), layout, shape)
        self.request = PrunedRequest("r", layout, plan)
        generator = torch.Generator().manual_seed(n)
        self.attention = [
            attention_layer(
                "TRITON_ATTN",
                torch.randn(40, 2, 4, 8, generator=generator),
                impl=types.SimpleNamespace(scale=1.0),
            )
            for _ in range(2)
        ]
        self.table = random_table(40, generator)
        layers = layers_of(named(self.attention), self.table, 4)
        stats = WorkerStats(torch.device("cpu"), 2)
        self.moved = moved_rows_of(self.table)
        self.evictor = Evictor(layers, shape, stats, self.moved)

    def rows(self, layer):
        """Return `[H, slots, 8]` in the order of the request's cache."""
        return rows_of(self.attention[layer].kv_cache, self.table[0])

    def evict(self, before, after):
        self.evictor.after_forward(step_of(self.request, 0, before, after - before))


@pytest.mark.parametrize("method", ["lagkv", "random", "streaming"])
@pytest.mark.parametrize("max_read", [1, 1 << 20], ids=["one-by-one", "all-at-once"])
def test_a_prompt_is_cut_down_and_then_what_is_generated(monkeypatch, method, max_read):
    monkeypatch.setattr("tokenprune.engine.kv.evictor.MAX_READ", max_read)
    n = 2 + L * 5 + L - 1
    bench = Bench(method, n)
    lengths = bench.request.plan.lengths
    old = [bench.rows(layer) for layer in range(2)]
    bench.evict(0, n)
    held = lengths.physical(n, 0)
    assert held == n - 4 * L // 2
    for layer in range(2):
        new = bench.rows(layer)
        for head in range(2):
            kept = [
                next(i for i in range(n) if torch.equal(old[layer][head, i], row))
                for row in new[head, :held]
            ]
            assert kept == sorted(kept)
            assert kept[:2] == [0, 1]
            assert kept[1 - 2 * L :] == list(range(n + 1 - 2 * L, n))
            if method == "streaming":
                assert kept == [0, 1, *range(2 + 2 * L, n)]
            else:
                of_partition = [range(2 + L * p, 2 + L * (p + 1)) for p in range(4)]
                assert [sum(i in p for i in kept) for p in of_partition] == [L // 2] * 4
    # one more token completes the next partition
    work = eviction_due(bench.request.lengths, n, n + 1, 0)
    assert (work.first, work.count, work.begin, work.end) == (4, 1, 2 + 4 * L // 2, held + 1)
    middle = [bench.rows(layer) for layer in range(2)]
    bench.evict(n, n + 1)
    for layer in range(2):
        left = lengths.physical(n + 1, 0)
        assert left == held + 1 - L // 2
        new = bench.rows(layer)
        assert torch.equal(new[:, left - L : left], middle[layer][:, held + 1 - L : held + 1])
        if method != "streaming":
            whole = 2 + 4 * L // 2
            assert torch.equal(new[:, :whole], middle[layer][:, :whole])


@pytest.mark.parametrize("method", ["lagkv", "random", "streaming"])
@pytest.mark.parametrize("kept_places", [(), (1, 4)], ids=["all-blocks", "some-blocks"])
@pytest.mark.parametrize("sink", [2, 6])
def test_a_row_that_others_read_is_left_as_it_is(monkeypatch, method, kept_places, sink):
    monkeypatch.setattr("tokenprune.engine.kv.evictor.MAX_READ", 1)
    n = sink + L * 4
    in_place = Bench(method, n, sink=sink)
    in_place.evict(0, n)
    held = in_place.request.plan.lengths.physical(n, 0)
    bench = Bench(method, n, sink=sink)
    raw = bench.table[0, : -(-n // 4)].tolist()
    # blocks of the sink alone stay, and those that nobody else reads
    first, fresh = sink // 4, iter(bench.table[0, len(raw) :].tolist())
    target = [
        raw[j] if j < first or j in kept_places else next(fresh) for j in range(-(-held // 4))
    ]
    bench.moved.begin_step({0: (target,)})
    before = [layer.kv_cache.clone() for layer in bench.attention]
    bench.evict(0, n)
    assert bench.table[0, : len(target)].tolist() == target
    left = [block for block in raw if block not in target]
    assert len(left) > 3
    for layer in range(2):
        assert torch.equal(bench.rows(layer)[:, :held], in_place.rows(layer)[:, :held])
        assert torch.equal(bench.attention[layer].kv_cache[left], before[layer][left])
    # the next eviction is in place
    assert bench.moved.of(0, 0) is None


def test_nothing_is_due_before_the_prompt_is_complete_nor_when_all_is_kept():
    n = 2 + 6 * L
    bench = Bench("lagkv", n)
    assert eviction_due(bench.request.lengths, 0, n - 1, 0) is None
    assert eviction_due(bench.request.lengths, n - 1, n, 0).count == 5
    chunked = Bench("lagkv", n, when="chunk").request
    assert eviction_due(chunked.lengths, 0, n - 1, 0).count == 4
    assert eviction_due(chunked.lengths, n - 1, n, 0).count == 1
    whole = Bench("lagkv", n, keep_ratio=1.0)
    assert eviction_due(whole.request.lengths, 0, n, 0) is None
    old = whole.rows(0)
    whole.evict(0, n)
    assert torch.equal(whole.rows(0), old)


def test_kernel_blocks_that_are_not_those_of_the_table_are_refused():
    bench = Bench("lagkv", 50)
    with pytest.raises(ConfigurationError, match="--block-size 4"):
        layers_of(named(bench.attention), bench.table, 16)


def test_shifting_the_row_is_keeping_the_highest_score_of_all_that_left_the_window():
    n = 2 + L * 5 + L - 1
    bench = Bench("streaming", n)
    old = bench.rows(0)
    bench.evict(0, n)
    segments = Segments(4, 0, L, 0, 2, torch.device("cpu"))
    scores = bench.request.plan.kv.policy.score(segments)
    # of the four partitions that are cut down, as many tokens as stay, over all of them
    best = lag_keep(scores.reshape(2, 1, -1).contiguous(), 4 * L // 2)[:, 0] + 2
    kept = [0, 1, *best[0].tolist(), *range(2 + 4 * L, n)]
    assert torch.equal(bench.rows(0)[:, : len(kept)], old[:, kept])
