"""channel_scores: how much each key channel weighs in the products of queries and keys (ThinK).

    score[h, j] = mean over (g, t) of q[h, g, t, j]^2  *  mean over s of k[h, s, j]^2

with `g` over the query heads of KV head `h`. It is the squared Frobenius norm of the channel's
share of Q K^T divided by the number of logits, so scores of runs of keys average by length.

Source: ThinK, arXiv 2407.21018, in the form of the released code since 2024-12; the mean over the
query heads of a KV head is kvpress's. All sums are float32. One program per head and run of rows
adds up squares; the sums of the runs are added in order, so the result is deterministic.
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

# rows of one program
RUN = 1024


def channel_scores(q: Tensor, k: Tensor, *, backend: str | None = None) -> Tensor:
    """Score the channels of every KV head.

    Args:
        q: `[hq, w, d]` queries, RoPE applied; `hq` a multiple of `h`. Any float dtype and strides.
        k: `[h, n, d]` keys, RoPE applied; dtype of `q`.
        backend: `torch`, `triton` (CUDA, or the interpreter), or None to choose by device.

    Returns:
        `[h, d]` float32.

    Raises:
        ValueError: A shape, dtype or device is not as above.
    """
    _check(q, k)
    if choose_backend(backend, k.device) == "torch":
        return channel_scores_reference(q, k)
    grouped = _grouped(q, k.shape[0])
    return _sum_of_squares(grouped) / grouped.shape[1] * (_sum_of_squares(k) / k.shape[1])


def channel_scores_reference(q: Tensor, k: Tensor) -> Tensor:
    """Compute `channel_scores` in torch: in float32, or in float64 for float64 inputs."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries = _grouped(q, k.shape[0]).to(dtype).square().mean(1)
    return queries * k.to(dtype).square().mean(1)


def _grouped(q: Tensor, heads: int) -> Tensor:
    """Return the queries of all heads of a group as rows of one: `[h, g * w, d]`."""
    return q.reshape(heads, -1, q.shape[2])


def _sum_of_squares(x: Tensor) -> Tensor:
    h, n, d = x.shape
    runs = ceil_div(n, RUN)
    partial = torch.empty((h, runs, d), dtype=torch.float32, device=x.device)
    block_d = next_power_of_2(d)
    with device_guard(x):
        _kernel()[(h, runs)](
            x,  # input
            partial,  # output
            *(n, d, *x.stride()),
            RUN=RUN,
            BLOCK_N=max(4096 // block_d, 1),
            BLOCK_D=block_d,
        )
    return partial.sum(1)


@functools.cache
@no_type_check
def _kernel():
    # triton is imported and its kernels are decorated on first use: the torch form needs neither
    global tl
    import triton
    import triton.language as tl

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

    return squares_kernel


def _check(q: Tensor, k: Tensor) -> None:
    if k.ndim != 3 or not k.is_floating_point() or 0 in k.shape:
        raise ValueError(f"k must be 3-D [h, n, d] of a float dtype, got {describe(k)}")
    if q.ndim != 3 or q.shape[2] != k.shape[2] or q.shape[0] % k.shape[0] or 0 in q.shape:
        raise ValueError(
            f"q must be 3-D [hq, w, {k.shape[2]}] with hq a multiple of {k.shape[0]}, "
            f"got {describe(q)}"
        )
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(f"q must have the dtype and device of k, {describe(k)}, got {describe(q)}")
