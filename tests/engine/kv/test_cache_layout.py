"""Rows really move: codecs against vLLM's own write operator."""

import types

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from tests.engine.kv.caches import cpu_isa
from tokenprune.engine.kv.cache_layout import KNOWN_BACKENDS, PermutedLayout, RowLayout, layout_of
from tokenprune.errors import ConfigurationError

BLOCK = 32
CPU_CASES = [
    pytest.param(torch.float32, 64, 32, id="float32"),
    pytest.param(torch.bfloat16, 64, 32, id="bfloat16"),
    pytest.param(torch.bfloat16, 128, 128, id="bfloat16-large-blocks"),
    pytest.param(torch.float16, 64, 32, id="float16"),
    pytest.param(torch.float32, 80, 32, id="head-size-80"),
    pytest.param(torch.bfloat16, 64, 16, id="blocks-of-16"),
]


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
    monkeypatch.setattr("tokenprune.engine.kv.cache_layout.MAX_SCRATCH", 2 * 2 * head_size * 7)
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
