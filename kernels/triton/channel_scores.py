"""The kernel of channel_scores: a program per head and run of rows adds up squares."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.kernels.ops.backend import ceil_div, device_guard, next_power_of_2

# rows of one program
RUN = 1024


def sum_of_squares(x: Tensor) -> Tensor:
    """Return the sums over rows of the squares of `[h, n, d]`, `[h, d]` float32."""
    h, n, d = x.shape
    runs = ceil_div(n, RUN)
    partial = torch.empty((h, runs, d), dtype=torch.float32, device=x.device)
    block_d = next_power_of_2(d)
    with device_guard(x):
        squares_kernel[(h, runs)](
            x,  # input
            partial,  # output
            *(n, d, *x.stride()),
            RUN=RUN,
            BLOCK_N=max(4096 // block_d, 1),
            BLOCK_D=block_d,
        )
    return partial.sum(1)


@triton.jit
def squares_kernel(
    x_ptr,
    partial_ptr,
    n,
    d,
    stride_h,
    stride_n,
    stride_d,
    RUN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the sums of squares of one run of rows of one head."""
    head = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1).to(tl.int64)
    x_ptr += head * stride_h
    cols = tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
    in_row = cols < d
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, RUN, BLOCK_N):
        offsets = start + tl.arange(0, BLOCK_N)
        rows = run * RUN + offsets
        # a tile may reach beyond its run, where the next program begins
        in_tile = ((offsets < RUN) & (rows < n))[:, None] & in_row[None, :]
        at = rows[:, None] * stride_n + cols[None, :] * stride_d
        x = tl.load(x_ptr + at, mask=in_tile, other=0.0).to(tl.float32)
        total += tl.sum(x * x, axis=0)
    out_ptr = partial_ptr + (head * tl.num_programs(1) + run) * d
    tl.store(out_ptr + cols, total, mask=in_row)
