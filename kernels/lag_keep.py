"""lag_keep: the tokens of each partition with the highest scores (LagKV).

    out[h, p] = the `keep` indices i of the partition with the highest score[h, p, i], ascending

Ties keep the lower index. A token's rank is the number of tokens that beat it, so no sort is
needed and equal inputs give equal bits; kernel and reference agree exactly.
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


def lag_keep(scores: Tensor, keep: int, *, backend: str | None = None) -> Tensor:
    """Choose the tokens to keep of each partition.

    Args:
        scores: `[h, p, lag]` float32, free of NaN.
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
    return _lag_keep_triton(scores, keep)


def lag_keep_reference(scores: Tensor, keep: int) -> Tensor:
    """Compute `lag_keep` in torch, for any float dtype."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :keep].sort(dim=-1).values


def _lag_keep_triton(scores: Tensor, keep: int) -> Tensor:
    h, p, lag = scores.shape
    kept = torch.empty((h, p, keep), dtype=torch.int64, device=scores.device)
    if kept.numel() == 0:
        return kept
    block = next_power_of_2(lag)
    with device_guard(scores):
        _kernel()[(h * p,)](
            scores.contiguous(),  # input
            kept,  # output
            *(lag, keep),
            BLOCK=block,
            BLOCK_J=min(block, max(4096 // block, 1)),
            num_warps=8 if block >= 1024 else 4,
        )
    return kept


@functools.cache
@no_type_check
def _kernel():
    # triton is imported and its kernels are decorated on first use: the torch form needs neither
    global tl
    import triton
    import triton.language as tl

    @triton.jit
    def keep_kernel(
        scores_ptr,
        kept_ptr,
        lag,
        keep,
        BLOCK: tl.constexpr,
        BLOCK_J: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        scores_ptr += row * lag
        tokens = tl.arange(0, BLOCK)
        in_partition = tokens < lag
        mine = tl.load(scores_ptr + tokens, mask=in_partition, other=float("-inf"))
        rank = tl.zeros([BLOCK], tl.int32)
        for start in range(0, lag, BLOCK_J):
            others = start + tl.arange(0, BLOCK_J)
            theirs = tl.load(scores_ptr + others, mask=others < lag, other=float("-inf"))
            higher = theirs[None, :] > mine[:, None]
            first = (theirs[None, :] == mine[:, None]) & (others[None, :] < tokens[:, None])
            beaten = (higher | first) & (others < lag)[None, :]
            rank += tl.sum(beaten.to(tl.int32), axis=1)
        is_kept = in_partition & (rank < keep)
        # the place among the kept ones, which are in order
        place = tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
        tl.store(kept_ptr + row * keep + place, tokens.to(tl.int64), mask=is_kept)

    return keep_kernel
