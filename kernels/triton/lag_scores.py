"""The kernel of lag_scores: one program per head and partition."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.kernels.ops.backend import device_guard, next_power_of_2


def lag_scores_triton(
    k: Tensor, v: Tensor, *, sink: int, lag: int, constant: float, max_normalised: float
) -> Tensor:
    """Compute `lag_scores` with Triton; arguments and result are its own.

    `constant` and `max_normalised` are what its module defines.
    """
    h, n, d = k.shape
    partitions = max(n - sink, 0) // lag
    scores = torch.empty((h, max(partitions - 1, 0), lag), dtype=torch.float32, device=k.device)
    if scores.numel() == 0:
        return scores
    block_d = next_power_of_2(d)
    block_l = min(next_power_of_2(lag), max(8192 // block_d, 1))
    with device_guard(k):
        for z, accumulate in ((k, False), (v, True)):
            scores_kernel[(h, partitions - 1)](
                z,  # input
                scores,  # output
                *(sink, lag, d, *z.stride()),
                ACCUMULATE=accumulate,
                CONSTANT=constant,
                MAX_NORMALISED=max_normalised,
                BLOCK_L=block_l,
                BLOCK_D=block_d,
                num_warps=8 if block_l * block_d >= 8192 else 4,
            )
    return scores


@triton.jit
def scores_kernel(
    z_ptr,
    scores_ptr,
    sink,
    lag,
    d,
    stride_h,
    stride_n,
    stride_d,
    ACCUMULATE: tl.constexpr,
    CONSTANT: tl.constexpr,
    MAX_NORMALISED: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write, or add, the scores of one partition of one head."""
    head = tl.program_id(0).to(tl.int64)
    partition = tl.program_id(1).to(tl.int64)
    first = sink + partition * lag
    row_ptr = scores_ptr + (head * tl.num_programs(1) + partition) * lag
    z_ptr += head * stride_h
    cols = tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
    in_row = cols < d

    low = tl.full([BLOCK_D], float("inf"), tl.float32)
    high = tl.full([BLOCK_D], float("-inf"), tl.float32)
    for start in range(0, lag, BLOCK_L):
        tokens = start + tl.arange(0, BLOCK_L)  # [BLOCK_L]
        in_tile = (tokens < lag)[:, None] & in_row[None, :]
        at = (first + lag + tokens)[:, None] * stride_n + cols[None, :] * stride_d
        z = tl.load(z_ptr + at, mask=in_tile, other=0.0).to(tl.float32)
        # minimum and maximum pass over a NaN; an infinity makes the span infinite or NaN
        z = tl.where(z == z, z, float("inf"))
        low = tl.minimum(low, tl.min(tl.where(in_tile, z, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(in_tile, z, float("-inf")), axis=0))
    span = high - low
    varies = in_row & (span > CONSTANT * tl.maximum(tl.abs(low), tl.abs(high)))
    varies = varies & (span < float("inf"))
    count = tl.sum(varies.to(tl.float32), axis=0)
    span = tl.where(varies, span, 1.0)
    low = tl.where(varies, low, 0.0)

    # the deviations are computed twice, once for the softmax's maximum and sum and once to
    # write it: a program cannot read what its other threads wrote without a barrier
    # finite, so that a partition without a defined token never computes -inf - -inf
    top = tl.full([1], -1e38, tl.float32)
    total = tl.zeros([1], tl.float32)
    for turn in tl.static_range(2):
        for start in range(0, lag, BLOCK_L):
            tokens = start + tl.arange(0, BLOCK_L)
            in_partition = tokens < lag
            used = in_partition[:, None] & varies[None, :]
            at = (first + tokens)[:, None] * stride_n + cols[None, :] * stride_d
            z = tl.load(z_ptr + at, mask=used, other=0.0).to(tl.float32)
            x = (z - low[None, :]) / span[None, :]
            # not by minimum and maximum, which would make a number of NaN
            x = tl.where(x > MAX_NORMALISED, MAX_NORMALISED, x)
            x = tl.where(x < -MAX_NORMALISED, -MAX_NORMALISED, x)
            x = tl.where(used, x, 0.0)
            mean = tl.sum(x, axis=1) / tl.maximum(count, 1.0)
            x = tl.where(used, x - mean[:, None], 0.0)
            std = tl.sqrt(tl.sum(x * x, axis=1) / tl.maximum(count - 1, 1.0))
            std = tl.where(in_partition & (std == std), std, float("-inf"))
            if turn == 0:
                higher = tl.maximum(top, tl.max(std, axis=0))
                total = total * tl.exp(top - higher) + tl.sum(tl.exp(std - higher), axis=0)
                top = higher
            else:
                score = tl.exp(std - top) / tl.where(total > 0, total, 1.0)
                if ACCUMULATE:
                    score += tl.load(row_ptr + tokens, mask=in_partition, other=0.0)
                tl.store(row_ptr + tokens, score, mask=in_partition)
