"""attention_importance: how much the image's own key patches attend to each patch.

    A_ij       = mean over heads of softmax_j(scale * q_hi . k_hj)      every patch sees every patch
    K          = {j : sum_i A_ij > t}        columns that receive more than t times the mean
    score_j    = sum over i in K of A_ij     `reduction="mean"` divides by |K|

Where no column is above the threshold the scores are the column means: K is taken as all patches
and averaged, so that they add up to 1 like one row of A, whatever the reduction. A row of a head
whose softmax is undefined (NaN or +inf among its logits, or -inf alone) contributes nothing, so
scores are always finite.

Source: VFlowOpt, arXiv 2508.05211, the context relevance of its importance map; code
sihany077/VFlowOpt@129eeef takes the mean where the paper has the sum. The empty K is ours: the
released code divides by zero there.
The kernel makes three passes over q and k (log-sum-exp of each row, column sums, column sums of
the rows in K) in float32 without atomics and without the N x N map: equal inputs give equal bits,
and the reference differs by rounding only.
"""

import torch
from torch import Tensor

from tokenprune.kernels.ops.backend import choose_backend, describe

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
    from tokenprune.kernels.ops.triton.attention_importance import column_sums, row_log_sums

    if q.dtype == torch.float64:
        q, k = q.float(), k.float()
    lse = row_log_sums(q, k, scale)
    received = column_sums(q, k, lse, torch.ones_like(lse[0]), scale)
    return column_sums(q, k, lse, _row_weights(received, threshold, reduction), scale)


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
                # a softmax is NaN as a whole or not at all
                sums += weights[rows] @ torch.softmax(logits, dim=-1).nan_to_num(nan=0.0)
        return sums / h

    received = column_sums(torch.ones(n, dtype=dtype, device=q.device))
    return column_sums(_row_weights(received, threshold, reduction))


def _row_weights(received: Tensor, threshold: float, reduction: str) -> Tensor:
    """Return what each row counts in the last pass; nothing here waits for the device."""
    chosen = (received > threshold).to(received.dtype)
    count = chosen.sum()
    weights = chosen / count.clamp_min(1) if reduction == "mean" else chosen
    return torch.where(count > 0, weights, 1 / len(received))


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
