"""lag_compact: move kept rows of a paged KV cache towards the front, each KV head its own rows.

    cache[slot(begin + j), h] = cache[slot(source[h, j]), h]      j = 0, 1, ...

`slot` looks a cache index up in the block table. Sources ascend and never lie before their
destination, so the rows can be moved in place, a tile at a time in ascending order: what a tile
overwrites, no later tile reads. Moves bytes and does no arithmetic: kernel and reference agree
exactly. One program per head and run of channels walks over the rows; scratch is one tile.
"""

import functools
from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from tokenprune.kernels.ops.backend import (
    ceil_div,
    choose_backend,
    describe,
    device_guard,
    next_power_of_2,
)

if TYPE_CHECKING:
    import triton.language as tl  # noqa: F401 - mypy resolves the annotations of the kernels

# rows of each head that the reference holds at once
TILE = 2048


def lag_compact(
    cache: Tensor, blocks: Tensor, source: Tensor, begin: int, *, backend: str | None = None
) -> None:
    """Move rows of one request in one layer, in place.

    Args:
        cache: `[B, h, S, w]` blocks of `S` slots; a row holds the key and value of one token in
            one head. Any strides, the last one 1.
        blocks: `[num_blocks]` int32 or int64, the request's block table.
        source: `[h, m]` or `[1, m]` int64 cache indices, strictly ascending, `source[:, j]` at
            least `begin + j`. A single row stands for all heads.
        begin: Cache index of the first destination.
        backend: `torch`, `triton` (CUDA, or the interpreter), or None to choose by device.

    Raises:
        ValueError: A shape, dtype or stride is not as above.
            Indices are not checked: that would synchronise with the GPU.
    """
    if cache.ndim != 4 or cache.stride(3) != 1:
        raise ValueError(f"cache must be 4-D [B, h, S, w] with dense rows, got {describe(cache)}")
    if source.ndim != 2 or source.shape[0] not in (1, cache.shape[1]):
        raise ValueError(f"source must be [{cache.shape[1]} or 1, m], got {describe(source)}")
    if choose_backend(backend, cache.device) == "torch":
        lag_compact_reference(cache, blocks, source, begin)
    else:
        _lag_compact_triton(cache, blocks, source, begin)


def lag_compact_reference(cache: Tensor, blocks: Tensor, source: Tensor, begin: int) -> None:
    """Compute `lag_compact` in torch, `TILE` rows of each head at a time."""
    block_size = cache.shape[2]
    heads = torch.arange(cache.shape[1], device=cache.device)[:, None]
    blocks = blocks.long()
    for start in range(0, source.shape[1], TILE):
        take = source[:, start : start + TILE]
        put = begin + start + torch.arange(take.shape[1], device=cache.device)
        rows = cache[blocks[take // block_size], heads, take % block_size]  # [h, tile, w]
        cache[blocks[put // block_size], heads, put % block_size] = rows


def _lag_compact_triton(cache: Tensor, blocks: Tensor, source: Tensor, begin: int) -> None:
    h, width = cache.shape[1], cache.shape[3]
    if source.shape[1] == 0:
        return
    block_w = min(next_power_of_2(width), 64)
    with device_guard(cache):
        _kernel()[(h, ceil_div(width, block_w))](
            *(cache, blocks.contiguous(), source.contiguous()),
            *(begin, source.shape[1], source.shape[1] if source.shape[0] > 1 else 0),
            *(cache.shape[2], width, *cache.stride()[:3]),
            BLOCK_M=8192 // block_w,
            BLOCK_W=block_w,
            num_warps=8,
        )


@functools.cache
@no_type_check
def _kernel():
    # triton is imported and its kernels are decorated on first use: the torch form needs neither
    global tl
    import triton
    import triton.language as tl

    @triton.jit
    def compact_kernel(
        cache_ptr,
        blocks_ptr,
        source_ptr,
        begin,
        num_rows,
        stride_source,
        block_size,
        width,
        stride_b,
        stride_h,
        stride_s,
        BLOCK_M: tl.constexpr,
        BLOCK_W: tl.constexpr,
    ):
        head = tl.program_id(0).to(tl.int64)
        cache_ptr += head * stride_h
        source_ptr += head * stride_source
        cols = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
        for start in range(0, num_rows, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            in_range = rows < num_rows
            in_tile = in_range[:, None] & (cols < width)[None, :]
            take = tl.load(source_ptr + rows, mask=in_range, other=0)
            put = begin + rows
            from_block = tl.load(blocks_ptr + take // block_size, mask=in_range, other=0)
            to_block = tl.load(blocks_ptr + put // block_size, mask=in_range, other=0)
            at = from_block.to(tl.int64) * stride_b + (take % block_size) * stride_s
            to = to_block.to(tl.int64) * stride_b + (put % block_size) * stride_s
            tile = tl.load(cache_ptr + at[:, None] + cols[None, :], mask=in_tile, other=0.0)
            # other threads may overwrite what this one reads
            tl.debug_barrier()
            tl.store(cache_ptr + to[:, None] + cols[None, :], tile, mask=in_tile)

    return compact_kernel
