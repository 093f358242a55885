"""lag_scores: how much each cached token stands out, seen from the tokens behind it (LagKV).

The tokens behind the sink form partitions of `lag`. With min and max per channel over partition
p + 1, for the tokens of partition p and Z = K, V:

    x = (Z - min) / (max - min)      s_Z = softmax over the partition of std over channels of x
    score = s_K + s_V                std with n - 1 in the denominator

A channel that is constant over partition p + 1, up to rounding, is left out of the std.

Source: LagKV, arXiv 2504.04704; code AI-Lab-China-Merchants-Bank/LagKV@2a9d19e. The code has no
guard: a constant channel makes its partition NaN. It computes in the cache's dtype, we in float32.
One program per head and partition; the reference differs by rounding only.
"""

import functools
from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from tokenprune.kernels.ops.backend import (
    choose_backend,
    describe,
    device_guard,
    next_power_of_2,
)

if TYPE_CHECKING:
    import triton.language as tl  # noqa: F401 - mypy resolves the annotations of the kernels

# a range below this share of the values it spans is rounding, not information
CONSTANT = 1e-6
# squares of normalised values must stay finite when summed; no real cache comes near
MAX_NORMALISED = 1e15


def lag_scores(k: Tensor, v: Tensor, *, sink: int, lag: int, backend: str | None = None) -> Tensor:
    """Score the tokens of every partition but the last, which is only looked at.

    Args:
        k: `[h, n, d]` cached keys, RoPE applied; any float dtype, any strides.
        v: `[h, n, d]` cached values, dtype of `k`.
        sink: Tokens before the first partition.
        lag: Tokens of a partition. Tokens behind the last whole one are ignored.
        backend: `torch`, `triton` (CUDA, or the interpreter), or None to choose by device.

    Returns:
        `[h, partitions - 1, lag]` float32; empty with fewer than two partitions.

    Raises:
        ValueError: A shape, dtype, device or number is not as above.
    """
    _check(k, v, sink, lag)
    if choose_backend(backend, k.device) == "torch":
        return lag_scores_reference(k, v, sink=sink, lag=lag).float()
    return _lag_scores_triton(k, v, sink=sink, lag=lag)


def lag_scores_reference(k: Tensor, v: Tensor, *, sink: int, lag: int) -> Tensor:
    """Compute `lag_scores` in torch: in float32, or in float64 for float64 inputs."""
    return _scores_of_one(k, sink, lag) + _scores_of_one(v, sink, lag)


def _scores_of_one(z: Tensor, sink: int, lag: int) -> Tensor:
    h, n, d = z.shape
    partitions = max(n - sink, 0) // lag
    if partitions < 2:
        return z.new_empty((h, 0, lag), dtype=torch.float32)
    z = z[:, sink : sink + partitions * lag].reshape(h, partitions, lag, d)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    low, high = z[:, 1:].aminmax(dim=2, keepdim=True)
    span = high - low
    varies = span > CONSTANT * torch.maximum(low.abs(), high.abs())  # [h, p, 1, d]
    x = (z[:, :-1] - low) / torch.where(varies, span, 1.0)
    x = torch.where(varies, x.clamp(-MAX_NORMALISED, MAX_NORMALISED), 0.0)
    count = varies.sum(-1)  # [h, p, 1]
    mean = x.sum(-1) / count.clamp(min=1)
    square = torch.where(varies, x - mean[..., None], 0.0).square().sum(-1)
    return torch.softmax((square / (count - 1).clamp(min=1)).sqrt(), dim=-1)


def _lag_scores_triton(k: Tensor, v: Tensor, *, sink: int, lag: int) -> Tensor:
    h, n, d = k.shape
    partitions = max(n - sink, 0) // lag
    scores = torch.empty((h, max(partitions - 1, 0), lag), dtype=torch.float32, device=k.device)
    if scores.numel() == 0:
        return scores
    block_d = next_power_of_2(d)
    block_l = min(next_power_of_2(lag), max(8192 // block_d, 1))
    with device_guard(k):
        for z, accumulate in ((k, False), (v, True)):
            _kernel()[(h, partitions - 1)](
                z,  # input
                scores,  # output
                *(sink, lag, d, *z.stride()),
                ACCUMULATE=accumulate,
                CONSTANT=CONSTANT,
                MAX_NORMALISED=MAX_NORMALISED,
                BLOCK_L=block_l,
                BLOCK_D=block_d,
                num_warps=8 if block_l * block_d >= 8192 else 4,
            )
    return scores


@functools.cache
@no_type_check
def _kernel():
    # triton is imported and its kernels are decorated on first use: the torch form needs neither
    global tl
    import triton
    import triton.language as tl

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
            low = tl.minimum(low, tl.min(tl.where(in_tile, z, float("inf")), axis=0))
            high = tl.maximum(high, tl.max(tl.where(in_tile, z, float("-inf")), axis=0))
        span = high - low
        varies = in_row & (span > CONSTANT * tl.maximum(tl.abs(low), tl.abs(high)))
        count = tl.sum(varies.to(tl.float32), axis=0)
        span = tl.where(varies, span, 1.0)
        low = tl.where(varies, low, 0.0)

        # the deviations are computed twice, once for the softmax's maximum and sum and once to
        # write it: a program cannot read what its other threads wrote without a barrier
        top = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        for turn in tl.static_range(2):
            for start in range(0, lag, BLOCK_L):
                tokens = start + tl.arange(0, BLOCK_L)
                in_partition = tokens < lag
                used = in_partition[:, None] & varies[None, :]
                at = (first + tokens)[:, None] * stride_n + cols[None, :] * stride_d
                z = tl.load(z_ptr + at, mask=used, other=0.0).to(tl.float32)
                x = (z - low[None, :]) / span[None, :]
                x = tl.minimum(tl.maximum(x, -MAX_NORMALISED), MAX_NORMALISED)
                x = tl.where(used, x, 0.0)
                mean = tl.sum(x, axis=1) / tl.maximum(count, 1.0)
                x = tl.where(used, x - mean[:, None], 0.0)
                std = tl.sqrt(tl.sum(x * x, axis=1) / tl.maximum(count - 1, 1.0))
                if turn == 0:
                    std = tl.where(in_partition, std, float("-inf"))
                    higher = tl.maximum(top, tl.max(std, axis=0))
                    total = total * tl.exp(top - higher) + tl.sum(tl.exp(std - higher), axis=0)
                    top = higher
                else:
                    score = tl.exp(std - top) / total
                    if ACCUMULATE:
                        score += tl.load(row_ptr + tokens, mask=in_partition, other=0.0)
                    tl.store(row_ptr + tokens, score, mask=in_partition)

    return scores_kernel


def _check(k: Tensor, v: Tensor, sink: int, lag: int) -> None:
    if k.ndim != 3 or not k.is_floating_point():
        raise ValueError(f"k must be 3-D [h, n, d] of a float dtype, got {describe(k)}")
    if v.shape != k.shape or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(f"v must be like k, {describe(k)}, got {describe(v)}")
    if sink < 0:
        raise ValueError(f"sink must be at least 0, got {sink}")
    if lag < 1:
        raise ValueError(f"lag must be at least 1, got {lag}")
