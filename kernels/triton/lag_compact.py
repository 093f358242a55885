"""The kernel of lag_compact: a program per head and run of channels walks over the rows."""

import triton
import triton.language as tl
from torch import Tensor

from tokenprune.kernels.ops.backend import ceil_div, device_guard, next_power_of_2


def lag_compact_triton(
    cache: Tensor, blocks: Tensor, source: Tensor, begin: int, into: Tensor
) -> None:
    """Compute `lag_compact` with Triton; the arguments are its own."""
    h, width = cache.shape[1], cache.shape[3]
    if source.shape[1] == 0:
        return
    block_w = min(next_power_of_2(width), 64)
    with device_guard(cache):
        compact_kernel[(h, ceil_div(width, block_w))](
            *(cache, blocks.contiguous(), into.contiguous(), source.contiguous()),
            *(begin, source.shape[1], source.shape[1] if source.shape[0] > 1 else 0),
            *(cache.shape[2], width, *cache.stride()[:3]),
            BLOCK_M=8192 // block_w,
            BLOCK_W=block_w,
            num_warps=8,
        )


@triton.jit
def compact_kernel(
    cache_ptr,
    blocks_ptr,
    into_ptr,
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
    """Move the rows of one head and one run of channels, in ascending order."""
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
        to_block = tl.load(into_ptr + put // block_size, mask=in_range, other=0)
        at = from_block.to(tl.int64) * stride_b + (take % block_size) * stride_s
        to = to_block.to(tl.int64) * stride_b + (put % block_size) * stride_s
        tile = tl.load(cache_ptr + at[:, None] + cols[None, :], mask=in_tile, other=0.0)
        # other threads may overwrite what this one reads
        tl.debug_barrier()
        tl.store(cache_ptr + to[:, None] + cols[None, :], tile, mask=in_tile)
