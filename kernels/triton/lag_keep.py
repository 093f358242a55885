"""The kernel of lag_keep: one program per partition counts who beats whom."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.kernels.ops.backend import device_guard, next_power_of_2


def lag_keep_triton(scores: Tensor, keep: int) -> Tensor:
    """Compute `lag_keep` with Triton; arguments and result are its own."""
    h, p, lag = scores.shape
    kept = torch.empty((h, p, keep), dtype=torch.int64, device=scores.device)
    if kept.numel() == 0:
        return kept
    block = next_power_of_2(lag)
    with device_guard(scores):
        keep_kernel[(h * p,)](
            scores.contiguous(),  # input
            kept,  # output
            *(lag, keep),
            BLOCK=block,
            BLOCK_J=min(block, max(4096 // block, 1)),
            num_warps=8 if block >= 1024 else 4,
        )
    return kept


@triton.jit
def keep_kernel(
    scores_ptr,
    kept_ptr,
    lag,
    keep,
    BLOCK: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Write the kept tokens of one partition."""
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * lag
    tokens = tl.arange(0, BLOCK)
    in_partition = tokens < lag
    mine = tl.load(scores_ptr + tokens, mask=in_partition, other=float("-inf"))
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, lag, BLOCK_J):
        others = start + tl.arange(0, BLOCK_J)
        theirs = tl.load(scores_ptr + others, mask=others < lag, other=float("-inf"))
        # NaN equals NaN only, and everything else is higher
        undefined, other_undefined = (mine != mine)[:, None], (theirs != theirs)[None, :]
        higher = (theirs[None, :] > mine[:, None]) | (undefined & ~other_undefined)
        equal = (theirs[None, :] == mine[:, None]) | (undefined & other_undefined)
        first = equal & (others[None, :] < tokens[:, None])
        beaten = (higher | first) & (others < lag)[None, :]
        rank += tl.sum(beaten.to(tl.int32), axis=1)
    is_kept = in_partition & (rank < keep)
    # the place among the kept ones, which are in order
    place = tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
    tl.store(kept_ptr + row * keep + place, tokens.to(tl.int64), mask=is_kept & (place < keep))
