"""lag_keep: the tokens of each partition with the highest scores (LagKV).

    out[h, p] = the `keep` indices i of the partition with the highest score[h, p, i], ascending

NaN ranks lowest, after -inf, and ties keep the lower index: exactly `keep` tokens are kept whatever
the scores are. A token's rank is the number of tokens that beat it, so the kernel needs no sort and
equal inputs give equal bits; kernel and reference agree exactly.
"""

import torch
from torch import Tensor

from tokenprune.kernels.ops.backend import choose_backend, describe
from tokenprune.kernels.ops.ranking import descending_order


def lag_keep(scores: Tensor, keep: int, *, backend: str | None = None) -> Tensor:
    """Choose the tokens to keep of each partition.

    Args:
        scores: `[h, p, lag]` float32.
        keep: Tokens to keep, in `[0, lag]`.
        backend: `torch`, `triton` (CUDA, or the interpreter), or None to choose by device.

    Returns:
        `[h, p, keep]` int64, ascending.

    Raises:
        ValueError: A shape, dtype or number is not as above.
    """
    if scores.ndim != 3 or scores.dtype != torch.float32:
        raise ValueError(f"scores must be 3-D [h, p, lag] float32, got {describe(scores)}")
    if not 0 <= keep <= scores.shape[2]:
        raise ValueError(f"keep must be in [0, {scores.shape[2]}], got {keep}")
    if choose_backend(backend, scores.device) == "torch":
        return lag_keep_reference(scores, keep)
    from tokenprune.kernels.ops.triton.lag_keep import lag_keep_triton

    return lag_keep_triton(scores, keep)


def lag_keep_reference(scores: Tensor, keep: int) -> Tensor:
    """Compute `lag_keep` in torch, for any float dtype."""
    return descending_order(scores)[..., :keep].sort(dim=-1).values
