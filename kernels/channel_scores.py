"""channel_scores: how much each key channel weighs in the products of queries and keys (ThinK).

    score[h, j] = mean over (g, t) of q[h, g, t, j]^2  *  mean over s of k[h, s, j]^2

with `g` over the query heads of KV head `h`. It is the squared Frobenius norm of the channel's
share of Q K^T divided by the number of logits, so scores of runs of keys average by length.

A channel of a head that holds NaN scores NaN, which `lag_keep` ranks lowest; no other channel is
touched.

Source: ThinK, arXiv 2407.21018, in the form of the released code since 2024-12; the mean over the
query heads of a KV head is kvpress's. All sums are float32. One program per head and run of rows
adds up squares; the sums of the runs are added in order, so the result is deterministic.
"""

import torch
from torch import Tensor

from tokenprune.kernels.ops.backend import choose_backend, describe


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
    from tokenprune.kernels.ops.triton.channel_scores import sum_of_squares

    grouped = _grouped(q, k.shape[0])
    return sum_of_squares(grouped) / grouped.shape[1] * (sum_of_squares(k) / k.shape[1])


def channel_scores_reference(q: Tensor, k: Tensor) -> Tensor:
    """Compute `channel_scores` in torch: in float32, or in float64 for float64 inputs."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries = _grouped(q, k.shape[0]).to(dtype).square().mean(1)
    return queries * k.to(dtype).square().mean(1)


def _grouped(q: Tensor, heads: int) -> Tensor:
    """Return the queries of all heads of a group as rows of one: `[h, g * w, d]`."""
    return q.reshape(heads, -1, q.shape[2])


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
