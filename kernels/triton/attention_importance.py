"""The kernels of attention_importance: the log-sum-exp of each row, then column sums."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.kernels.ops.backend import ceil_div, device_guard, next_power_of_2


def row_log_sums(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return `[h, n]` float32, log2 of the sum over keys of 2 to the power of the logits."""
    h, n, dh = q.shape
    lse = torch.empty(h, n, dtype=torch.float32, device=q.device)
    grid, tiles = _grid(q)
    with device_guard(q):
        lse_kernel[grid](
            *(q, k),  # inputs
            lse,  # output
            *(n, dh, *q.stride(), *k.stride(), scale * math.log2(math.e)),
            **tiles,
        )
    return lse


def column_sums(q: Tensor, k: Tensor, lse: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Return `[n]` float32, the mean over heads of each column's attention.

    Args:
        q: `[h, n, dh]`.
        k: `[h, n, dh]`.
        lse: `[h, n]` of `row_log_sums`.
        weights: `[n]` float32, what each row counts.
        scale: Factor of the logits.
    """
    h, n, dh = q.shape
    mass = torch.empty(h, n, dtype=torch.float32, device=q.device)
    grid, tiles = _grid(q)
    with device_guard(q):
        mass_kernel[grid](
            *(q, k, weights, lse),  # inputs
            mass,  # output
            *(n, dh, *q.stride(), *k.stride(), scale * math.log2(math.e)),
            **tiles,
        )
    return mass.sum(0) / h


def _grid(q: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    h, n, dh = q.shape
    block_dh = max(next_power_of_2(dh), 16)
    block = min(max(16384 // (block_dh * q.element_size()), 16), 64)
    tiles = {
        # triton's interpreter multiplies the bit patterns of bfloat16 as integers
        "WIDEN": q.dtype == torch.bfloat16 and not q.is_cuda,
        "BLOCK_M": block,
        "BLOCK_N": block,
        "BLOCK_DH": block_dh,
        "num_warps": 4,
        "num_stages": 2,
    }
    return (ceil_div(n, block), h), tiles


@triton.jit
def lse_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    n,
    dh,
    stride_q_h,
    stride_q_n,
    stride_q_d,
    stride_k_h,
    stride_k_n,
    stride_k_d,
    scale_log2,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DH: tl.constexpr,
):
    """Write log2 of the sum of 2 to the power of the logits, of a tile of rows of one head."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    dim = tl.arange(0, BLOCK_DH)  # [BLOCK_DH]
    at_q = head * stride_q_h + row.to(tl.int64)[:, None] * stride_q_n
    in_q = (row < n)[:, None] & (dim < dh)[None, :]
    q = tl.load(q_ptr + at_q + dim[None, :] * stride_q_d, mask=in_q, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)

    # finite, so that a tile of nothing but -inf adds nothing
    peak = tl.full([BLOCK_M], -1e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, n, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)  # [BLOCK_N], the first of a tile always exists
        at_k = head * stride_k_h + key.to(tl.int64)[None, :] * stride_k_n
        in_k = (dim < dh)[:, None] & (key < n)[None, :]
        k = tl.load(k_ptr + at_k + dim[:, None] * stride_k_d, mask=in_k, other=0.0)
        if WIDEN:
            k = k.to(tl.float32)
        logits = tl.dot(q, k, input_precision="tf32x3") * scale_log2  # [BLOCK_M, BLOCK_N]
        logits = tl.where((key < n)[None, :], logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        total *= tl.exp2(peak - new_peak)
        total += tl.sum(tl.exp2(logits - new_peak[:, None]), axis=1)
        peak = new_peak
    tl.store(lse_ptr + head * n + row, peak + tl.log2(total), mask=row < n)


@triton.jit
def mass_kernel(
    q_ptr,
    k_ptr,
    weights_ptr,
    lse_ptr,
    mass_ptr,
    n,
    dh,
    stride_q_h,
    stride_q_n,
    stride_q_d,
    stride_k_h,
    stride_k_n,
    stride_k_d,
    scale_log2,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DH: tl.constexpr,
):
    """Write the weighted column sums of the attention, of a tile of keys of one head."""
    head = tl.program_id(1).to(tl.int64)
    key = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    dim = tl.arange(0, BLOCK_DH)  # [BLOCK_DH]
    at_k = head * stride_k_h + key.to(tl.int64)[None, :] * stride_k_n
    in_k = (dim < dh)[:, None] & (key < n)[None, :]
    k = tl.load(k_ptr + at_k + dim[:, None] * stride_k_d, mask=in_k, other=0.0)
    if WIDEN:
        k = k.to(tl.float32)

    mass = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, n, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        in_row = row < n
        at_q = head * stride_q_h + row.to(tl.int64)[:, None] * stride_q_n
        in_q = in_row[:, None] & (dim < dh)[None, :]
        q = tl.load(q_ptr + at_q + dim[None, :] * stride_q_d, mask=in_q, other=0.0)
        lse = tl.load(lse_ptr + head * n + row, mask=in_row, other=0.0)
        weight = tl.load(weights_ptr + row, mask=in_row, other=0.0)
        if WIDEN:
            q = q.to(tl.float32)
        logits = tl.dot(q, k, input_precision="tf32x3") * scale_log2  # [BLOCK_M, BLOCK_N]
        # -inf where all logits of the row are, NaN where one of them is NaN or +inf
        is_defined = in_row & (lse > float("-inf"))
        logits = tl.where(is_defined[:, None], logits - lse[:, None], float("-inf"))
        mass += tl.sum(tl.exp2(logits) * weight[:, None], axis=0)
    tl.store(mass_ptr + head * n + key, mass, mask=key < n)
