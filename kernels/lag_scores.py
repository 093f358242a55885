"""lag_scores: how much each cached token stands out, seen from the tokens after it (LagKV).

The tokens after the sink form partitions of `lag`. With min and max per channel over partition
p + 1, for the tokens of partition p and Z = K, V:

    x = (Z - min) / (max - min)      s_Z = softmax over the partition of std over channels of x
    score = s_K + s_V                std with n - 1 in the denominator

A channel that is constant over partition p + 1, up to rounding, or not finite there, is left out
of the std. A token with NaN in another channel gets nothing of that term and takes no part in its
softmax; infinite values stand for very large ones. So scores are always finite, and what is not
finite reaches no partition but its own and the one before.

Source: LagKV, arXiv 2504.04704; code AI-Lab-China-Merchants-Bank/LagKV@2a9d19e. The code has no
guard: a constant channel makes its partition NaN. It computes in the cache's dtype, we in float32.
One program per head and partition; the reference differs by rounding only.
"""

import math

import torch
from torch import Tensor

from tokenprune.kernels.ops.backend import choose_backend, describe

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
        lag: Tokens of a partition. Tokens after the last whole one are ignored.
        backend: `torch`, `triton` (CUDA, or the interpreter), or None to choose by device.

    Returns:
        `[h, partitions - 1, lag]` float32; empty with fewer than two partitions.

    Raises:
        ValueError: A shape, dtype, device or number is not as above.
    """
    _check(k, v, sink, lag)
    if choose_backend(backend, k.device) == "torch":
        return lag_scores_reference(k, v, sink=sink, lag=lag).float()
    from tokenprune.kernels.ops.triton.lag_scores import lag_scores_triton

    return lag_scores_triton(
        k, v, sink=sink, lag=lag, constant=CONSTANT, max_normalised=MAX_NORMALISED
    )


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
    # [h, p, 1, d]; comparisons with NaN are false
    varies = (span > CONSTANT * torch.maximum(low.abs(), high.abs())) & (span < math.inf)
    x = (z[:, :-1] - low) / torch.where(varies, span, 1.0)
    x = torch.where(varies, x.clamp(-MAX_NORMALISED, MAX_NORMALISED), 0.0)
    count = varies.sum(-1)  # [h, p, 1]
    mean = x.sum(-1) / count.clamp(min=1)
    square = torch.where(varies, x - mean[..., None], 0.0).square().sum(-1)
    std = (square / (count - 1).clamp(min=1)).sqrt()
    undefined = std.isnan()
    share = torch.softmax(std.masked_fill(undefined, -math.inf), dim=-1)
    return share.masked_fill(undefined, 0.0)


def _check(k: Tensor, v: Tensor, sink: int, lag: int) -> None:
    if k.ndim != 3 or not k.is_floating_point():
        raise ValueError(f"k must be 3-D [h, n, d] of a float dtype, got {describe(k)}")
    if v.shape != k.shape or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(f"v must be like k, {describe(k)}, got {describe(v)}")
    if sink < 0:
        raise ValueError(f"sink must be at least 0, got {sink}")
    if lag < 1:
        raise ValueError(f"lag must be at least 1, got {lag}")
