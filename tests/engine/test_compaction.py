"""Rows really move: codecs against vLLM's own write operator, and whole evictions by hand."""

import types

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from tokenprune.engine.cache_layout import KNOWN_BACKENDS, PermutedLayout, RowLayout, layout_of
from tokenprune.engine.compaction import Compactor
from tokenprune.engine.stats import WorkerStats
from tokenprune.engine.step import PrunedRequest, due
from tokenprune.errors import ConfigurationError
from tokenprune.lengths import PromptLayout
from tokenprune.policies import EngineShape
from tokenprune.request import make_plan, parse_pruning

BLOCK = 32
CPU_CASES = [
    pytest.param(torch.float32, 64, 32, id="float32"),
    pytest.param(torch.bfloat16, 64, 32, id="bfloat16"),
    pytest.param(torch.bfloat16, 128, 128, id="bfloat16-large-blocks"),
    pytest.param(torch.float16, 64, 32, id="float16"),
    pytest.param(torch.float32, 80, 32, id="head-size-80"),
    pytest.param(torch.bfloat16, 64, 16, id="blocks-of-16"),
]


def cpu_isa(dtype, block_size, head_size):
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return _get_attn_isa(dtype, block_size, head_size)


def write(layout_name, isa, cache, blocks, key, value):
    """Write `[n, H, D]` to cache indices 0, 1, ... as the backend would."""
    block_size, width = cache.shape[2], cache.shape[3]
    index = torch.arange(len(key))
    slots = blocks.long()[index // block_size] * block_size + index % block_size
    if layout_name == "CPU_ATTN":
        from vllm import _custom_ops as ops

        parts = cache.view(len(cache), cache.shape[1], 2 * block_size, width // 2).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, *parts, slots, isa)
    else:
        rows = torch.cat([key, value], dim=2)
        cache[slots // block_size, :, slots % block_size] = rows


def make(dtype, head_size, block_size, backend, n, heads=2):
    generator = torch.Generator().manual_seed(n)
    num_blocks = -(-n // block_size)
    cache = torch.zeros(num_blocks + 2, heads, block_size, 2 * head_size, dtype=dtype)
    blocks = torch.randperm(num_blocks + 2, generator=generator)[:num_blocks].int()
    key, value = torch.randn(2, n, heads, head_size, generator=generator).to(dtype)
    isa = cpu_isa(dtype, block_size, head_size) if backend == "CPU_ATTN" else ""
    write(backend, isa, cache, blocks, key, value)
    layer = types.SimpleNamespace(isa=isa)
    return layout_of(backend, layer, cache), cache, blocks, key, value


@pytest.mark.parametrize(("dtype", "head_size", "block_size"), CPU_CASES)
def test_the_cpu_cache_is_read_as_it_was_written(dtype, head_size, block_size):
    n = 3 * block_size + 5
    layout, cache, blocks, key, value = make(dtype, head_size, block_size, "CPU_ATTN", n)
    assert isinstance(layout, PermutedLayout)
    for begin, end in [(0, n), (block_size - 1, block_size + 1), (7, 7 + block_size), (5, 6)]:
        k, v = layout.read(cache, blocks, begin, end)
        assert torch.equal(k, key[begin:end].transpose(0, 1))
        assert torch.equal(v, value[begin:end].transpose(0, 1))


@pytest.mark.parametrize("backend", ["CPU_ATTN", "TRITON_ATTN"])
@pytest.mark.parametrize(("dtype", "head_size", "block_size"), CPU_CASES)
def test_moved_rows_are_what_the_backend_would_have_written(
    monkeypatch, backend, dtype, head_size, block_size
):
    # several tiles
    monkeypatch.setattr("tokenprune.engine.cache_layout.MAX_SCRATCH", 2 * 2 * head_size * 7)
    n = 3 * block_size + 5
    layout, cache, blocks, key, value = make(dtype, head_size, block_size, backend, n)
    before = cache.clone()
    generator = torch.Generator().manual_seed(1)
    begin, count = 3, 2 * block_size
    source = torch.stack(
        [torch.randperm(n - begin, generator=generator)[:count].sort().values for _ in range(2)]
    )
    source += begin
    layout.move(cache, blocks, source, begin)
    for head in range(2):
        key[begin : begin + count, head] = key[source[head], head]
        value[begin : begin + count, head] = value[source[head], head]
    isa = cpu_isa(dtype, block_size, head_size) if backend == "CPU_ATTN" else ""
    write(backend, isa, before, blocks, key, value)
    assert torch.equal(cache, before)


def test_layouts_of_known_backends_and_no_other():
    cache = torch.zeros(1, 1, 16, 8)
    assert set(KNOWN_BACKENDS) == {"CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN"}
    for backend in ("FLASH_ATTN", "TRITON_ATTN"):
        assert isinstance(layout_of(backend, None, cache), RowLayout)
    with pytest.raises(ConfigurationError, match="got FLEX_ATTENTION"):
        layout_of("FLEX_ATTENTION", None, cache)


class Bench:
    """A compactor over two layers in one group, whose rows carry their position."""

    def __init__(self, method, n, **parameters):
        kv = {"method": method, "sink": 2, "lag": 4, "keep_ratio": 0.5, **parameters}
        pruning = parse_pruning({"kv": kv})
        layout = PromptLayout(n)
        plan = make_plan(pruning, layout, EngineShape(2, (0,), 4096))
        self.request = PrunedRequest("r", layout, plan)
        self.layers = {}
        generator = torch.Generator().manual_seed(n)
        for i in range(2):
            cache = torch.randn(40, 2, 4, 8, generator=generator)
            backend = types.SimpleNamespace(get_name=lambda: "TRITON_ATTN")
            self.layers[f"model.layers.{i}.attn"] = types.SimpleNamespace(
                kv_cache=cache, get_attn_backend=lambda backend=backend: backend
            )
        group = types.SimpleNamespace(layer_names=list(self.layers))
        self.table = torch.randperm(40, generator=generator)[None].int()
        tables = types.SimpleNamespace(
            block_sizes=[4], block_tables=[types.SimpleNamespace(gpu=self.table)]
        )
        config = types.SimpleNamespace(kv_cache_groups=[group])
        stats = WorkerStats(torch.device("cpu"), 2)
        self.compactor = Compactor(config, [[0]], self.layers, tables, stats)

    def rows(self, layer):
        """Return `[H, slots, 8]` in the order of the request's cache."""
        cache = self.layers[f"model.layers.{layer}.attn"].kv_cache
        return cache[self.table[0].long()].transpose(0, 1).reshape(2, -1, 8).clone()


@pytest.mark.parametrize("method", ["lagkv", "random", "streaming"])
@pytest.mark.parametrize("max_read", [1, 1 << 20], ids=["one-by-one", "all-at-once"])
def test_a_prompt_is_cut_down_and_then_what_is_generated(monkeypatch, method, max_read):
    monkeypatch.setattr("tokenprune.engine.compaction.MAX_READ", max_read)
    n = 2 + 4 * 5 + 3
    bench = Bench(method, n)
    lengths = bench.request.plan.lengths
    old = [bench.rows(layer) for layer in range(2)]
    bench.compactor.evict(bench.request, 0, 0, n)
    held = lengths.physical(n, 0)
    assert held == n - 4 * 2
    for layer in range(2):
        new = bench.rows(layer)
        for head in range(2):
            kept = [
                next(i for i in range(n) if torch.equal(old[layer][head, i], row))
                for row in new[head, :held]
            ]
            assert kept == sorted(kept)
            assert kept[:2] == [0, 1]
            assert kept[-7:] == list(range(n - 7, n))
            if method == "streaming":
                assert kept == [0, 1, *range(10, n)]
            else:
                per_partition = [sum(2 + 4 * p <= i < 6 + 4 * p for i in kept) for p in range(4)]
                assert per_partition == [2, 2, 2, 2]
    # one more token completes the next partition
    assert due(bench.request, n, n + 1, 0) == due(bench.request, n, n + 1, 0)
    work = due(bench.request, n, n + 1, 0)
    assert (work.first, work.count, work.begin, work.end) == (4, 1, 2 + 4 * 2, held + 1)
    middle = [bench.rows(layer) for layer in range(2)]
    bench.compactor.evict(bench.request, 0, n, n + 1)
    for layer in range(2):
        left = lengths.physical(n + 1, 0)
        assert left == held + 1 - 2
        new = bench.rows(layer)
        assert torch.equal(new[:, left - 4 : left], middle[layer][:, held - 3 : held + 1])
        if method != "streaming":
            assert torch.equal(new[:, :10], middle[layer][:, :10])


def test_nothing_is_due_before_the_prompt_is_complete_nor_when_all_is_kept():
    bench = Bench("lagkv", 50)
    assert due(bench.request, 0, 49, 0) is None
    assert due(bench.request, 49, 50, 0).count == 11
    chunked = Bench("lagkv", 50, when="chunk").request
    assert due(chunked, 0, 49, 0).count == 10
    assert due(chunked, 49, 50, 0).count == 1
    whole = Bench("lagkv", 50, keep_ratio=1.0)
    assert due(whole.request, 0, 50, 0) is None
    old = whole.rows(0)
    whole.compactor.evict(whole.request, 0, 0, 50)
    assert torch.equal(whole.rows(0), old)


def test_kernel_blocks_that_are_not_those_of_the_table_are_refused():
    bench = Bench("lagkv", 50)
    tables = types.SimpleNamespace(block_sizes=[16], block_tables=[])
    config = types.SimpleNamespace(
        kv_cache_groups=[types.SimpleNamespace(layer_names=list(bench.layers))]
    )
    with pytest.raises(ConfigurationError, match="--block-size 4"):
        Compactor(config, [[0]], bench.layers, tables, WorkerStats(torch.device("cpu"), 2))
