"""The kernel of transition_terms: each row is read once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.kernels.ops.backend import ceil_div, device_guard, next_power_of_2


def transition_terms_triton(
    x_in: Tensor, x_out: Tensor, visual: Tensor, *, signed: bool, scope: str
) -> tuple[Tensor, Tensor]:
    """Compute `transition_terms` with Triton; arguments and result are its own."""
    n, d = x_in.shape
    block_d = min(next_power_of_2(d), 8192)
    # wide rows get a program each, narrow ones share it
    block_n = min(max(4096 // block_d, 1), 16)
    num_partials = ceil_div(n, block_n)
    weighted = torch.empty(n, dtype=torch.float32, device=x_in.device)
    partials = torch.empty(num_partials, dtype=torch.float32, device=x_in.device)
    with device_guard(x_in):
        terms_kernel[(num_partials,)](
            *(x_in, x_out, visual.contiguous()),  # inputs
            *(weighted, partials),  # outputs
            *(n, d, *x_in.stride(), *x_out.stride()),
            SIGNED=signed,
            ALL_ROWS=scope == "all",
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=8 if block_d >= 4096 else 4,
        )
        # the mask waits for the stream, so it comes after the launch that reads the large tensors
        return weighted[visual], partials.sum()


@triton.jit
def terms_kernel(
    x_in_ptr,
    x_out_ptr,
    visual_ptr,
    weighted_ptr,
    partials_ptr,
    n,
    d,
    stride_in_n,
    stride_in_d,
    stride_out_n,
    stride_out_d,
    SIGNED: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the numerators of a tile of rows, and the sum of their softmax terms."""
    tile = tl.program_id(0).to(tl.int64)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_scope = rows < n
    if not ALL_ROWS:
        in_scope = tl.load(visual_ptr + rows, mask=in_scope, other=0) != 0

    square_in = tl.zeros([BLOCK_N], tl.float32)
    square_out = tl.zeros([BLOCK_N], tl.float32)
    inner = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, d, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
        in_tile = in_scope[:, None] & (cols < d)[None, :]
        at_in = rows[:, None] * stride_in_n + cols[None, :] * stride_in_d
        at_out = rows[:, None] * stride_out_n + cols[None, :] * stride_out_d
        a = tl.load(x_in_ptr + at_in, mask=in_tile, other=0.0).to(tl.float32)
        b = tl.load(x_out_ptr + at_out, mask=in_tile, other=0.0).to(tl.float32)
        square_in += tl.sum(a * a, axis=1)
        square_out += tl.sum(b * b, axis=1)
        inner += tl.sum(a * b, axis=1)

    norm_in = tl.sqrt(square_in)
    norm_out = tl.sqrt(square_out)
    cosine = inner / (tl.maximum(norm_in, 1e-8) * tl.maximum(norm_out, 1e-8))
    is_zero = norm_in == 0
    magnitude = tl.where(is_zero, 0.0, norm_out / tl.where(is_zero, 1.0, norm_in))
    # the largest direction term is known beforehand, so the softmax needs no pass for its max
    exponent = -1.0 - cosine if SIGNED else -tl.abs(cosine)
    is_defined = in_scope & (exponent == exponent)
    weight = tl.where(is_defined, tl.exp(exponent), 0.0)
    # 0 by infinity is NaN, so the product is masked as well
    weighted = tl.where(is_defined, weight * magnitude, 0.0)
    tl.store(weighted_ptr + rows, weighted, mask=rows < n)
    tl.store(partials_ptr + tile, tl.sum(weight, axis=0))
