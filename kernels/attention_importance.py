"""attention_importance: how much the image's own key patches attend to each patch.

    A_ij       = mean over heads of softmax_j(scale * q_hi . k_hj)      every patch sees every patch
    K          = {j : sum_i A_ij > t}        columns that receive more than t times the mean
    score_j    = sum over i in K of A_ij     `reduction="mean"` divides by |K|

Where no column is above the threshold the scores are the column means: K is taken as all patches
and averaged, so that they add up to 1 like one row of A, whatever the reduction.

Source: VFlowOpt, arXiv 2508.05211, the context relevance of its importance map; code
sihany077/VFlowOpt@129eeef takes the mean where the paper has the sum. The empty K is ours: the
released code divides by zero there.
The kernel makes three passes over q and k (log-sum-exp of each row, column sums, column sums of
the rows in K) in float32 without atomics and without the N x N map: equal inputs give equal bits,
and the reference differs by rounding only.
"""

import functools
import math
from typing import TYPE_CHECKING, Any, no_type_check

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

REDUCTIONS = ("sum", "mean")
# attention weights the reference holds at once: 16 MiB of float32, or one row if that is more
MAX_SCRATCH = 1 << 22


def attention_importance(
    q: Tensor,
    k: Tensor,
    *,
    threshold: float,
    scale: float,
    reduction: str = "sum",
    backend: str | None = None,
) -> Tensor:
    """Score the patches of one crop by the attention that its most attended patches pay them.

    Args:
        q: `[h, n, dh]` queries of one crop, a class token left out; any float dtype and strides.
        k: `[h, n, dh]` keys, dtype and device of `q`.
        threshold: `t`: a patch is in K if it receives more than `t` times the mean attention.
        scale: Factor of the logits, usually `dh ** -0.5`.
        reduction: `sum` over K (paper) or `mean` (released code).
        backend: `torch`, `triton` (CUDA, or the interpreter), or None to choose by device.

    Returns:
        `[n]` float32.

    Raises:
        ValueError: A shape, dtype, device or name is not as above.
    """
    _check(q, k, reduction)
    options = {"threshold": threshold, "scale": scale, "reduction": reduction}
    if choose_backend(backend, q.device) == "torch":
        return attention_importance_reference(q, k, **options).float()  # type: ignore[arg-type]
    return _attention_importance_triton(q, k, **options)  # type: ignore[arg-type]


def attention_importance_reference(
    q: Tensor, k: Tensor, *, threshold: float, scale: float, reduction: str = "sum"
) -> Tensor:
    """Compute `attention_importance` in torch: in float32, or in float64 for float64 inputs."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    h, n, _ = q.shape
    rows_per_block = max(MAX_SCRATCH // max(n, 1), 1)

    def column_sums(weights: Tensor) -> Tensor:
        sums = torch.zeros(n, dtype=dtype, device=q.device)
        for head in range(h):
            keys = k[head].to(dtype)
            for block in range(0, n, rows_per_block):
                rows = slice(block, block + rows_per_block)
                logits = (q[head, rows].to(dtype) @ keys.T) * scale
                sums += weights[rows] @ torch.softmax(logits, dim=-1)
        return sums / h

    received = column_sums(torch.ones(n, dtype=dtype, device=q.device))
    return column_sums(_row_weights(received, threshold, reduction))


def _row_weights(received: Tensor, threshold: float, reduction: str) -> Tensor:
    """Return what each row counts in the last pass; nothing here waits for the device."""
    chosen = (received > threshold).to(received.dtype)
    count = chosen.sum()
    weights = chosen / count.clamp_min(1) if reduction == "mean" else chosen
    return torch.where(count > 0, weights, 1 / len(received))


def _attention_importance_triton(
    q: Tensor, k: Tensor, *, threshold: float, scale: float, reduction: str
) -> Tensor:
    if q.dtype == torch.float64:
        q, k = q.float(), k.float()
    h, n, dh = q.shape
    lse_kernel, mass_kernel = _kernels()
    block_dh = max(next_power_of_2(dh), 16)
    block = min(max(16384 // (block_dh * q.element_size()), 16), 64)
    tiles: dict[str, Any] = {
        # triton's interpreter multiplies the bit patterns of bfloat16 as integers
        "WIDEN": q.dtype == torch.bfloat16 and not q.is_cuda,
        "BLOCK_M": block,
        "BLOCK_N": block,
        "BLOCK_DH": block_dh,
        "num_warps": 4,
        "num_stages": 2,
    }
    grid = (ceil_div(n, block), h)
    strides = (*q.stride(), *k.stride())
    scale_log2 = scale * math.log2(math.e)
    lse = torch.empty(h, n, dtype=torch.float32, device=q.device)
    weights = torch.ones(n, dtype=torch.float32, device=q.device)
    mass = torch.empty(h, n, dtype=torch.float32, device=q.device)
    with device_guard(q):
        lse_kernel[grid](q, k, lse, n, dh, *strides, scale_log2, **tiles)
        mass_kernel[grid](q, k, weights, lse, mass, n, dh, *strides, scale_log2, **tiles)
        weights = _row_weights(mass.sum(0) / h, threshold, reduction)
        mass_kernel[grid](q, k, weights, lse, mass, n, dh, *strides, scale_log2, **tiles)
    return mass.sum(0) / h


@functools.cache
@no_type_check
def _kernels():
    # triton is imported and its kernels are decorated on first use: the torch form needs neither
    global tl
    import triton
    import triton.language as tl

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
        head = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        dim = tl.arange(0, BLOCK_DH)  # [BLOCK_DH]
        at_q = head * stride_q_h + row.to(tl.int64)[:, None] * stride_q_n
        in_q = (row < n)[:, None] & (dim < dh)[None, :]
        q = tl.load(q_ptr + at_q + dim[None, :] * stride_q_d, mask=in_q, other=0.0)
        if WIDEN:
            q = q.to(tl.float32)

        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
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
            mass += tl.sum(tl.exp2(logits - lse[:, None]) * weight[:, None], axis=0)
        tl.store(mass_ptr + head * n + key, mass, mask=key < n)

    return lse_kernel, mass_kernel


def _check(q: Tensor, k: Tensor, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if q.ndim != 3 or not q.is_floating_point() or 0 in q.shape:
        raise ValueError(
            f"q must be 3-D [h, n, dh] of a float dtype with at least one patch, got {describe(q)}"
        )
    if k.shape != q.shape or k.dtype != q.dtype or k.device != q.device:
        raise ValueError(
            f"k must have the shape, dtype and device of q, {describe(q)}, got {describe(k)}"
        )
