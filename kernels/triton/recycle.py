"""The kernel of recycle: a program per row and run of columns folds the row's tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.kernels.ops.backend import ceil_div, device_guard, next_power_of_2


def fold(features: Tensor, slot: Tensor, weight: Tensor, keep: int) -> Tensor:
    """Fold each token into the row it goes to.

    Args:
        features: `[n, d]`.
        slot: `[n]` int64, the row of each token, `keep` for none.
        weight: `[n]` float, relative within a row.
        keep: Rows.

    Returns:
        `[keep, d]` float32.
    """
    d = features.shape[1]
    ordered = slot.sort(stable=True)
    rows = torch.arange(keep + 1, device=slot.device)
    begin = torch.searchsorted(ordered.values, rows)
    block_d = min(next_power_of_2(d), 1024)
    out = torch.empty(keep, d, dtype=torch.float32, device=features.device)
    with device_guard(features):
        fold_kernel[(keep, ceil_div(d, block_d))](
            *(features, ordered.indices, begin, weight.float()),  # inputs
            out,  # output
            *(d, *features.stride()),
            BLOCK_D=block_d,
        )
    return out


@triton.jit
def fold_kernel(
    features_ptr,
    members_ptr,
    begin_ptr,
    weight_ptr,
    out_ptr,
    d,
    stride_n,
    stride_d,
    BLOCK_D: tl.constexpr,
):
    """Write one run of columns of one row; members are added in their order."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    begin = tl.load(begin_ptr + row)
    end = tl.load(begin_ptr + row + 1)
    weighted = tl.zeros([BLOCK_D], tl.float32)
    plain = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    for at in range(begin, end):
        member = tl.load(members_ptr + at)
        weight = tl.load(weight_ptr + member)
        at_x = member * stride_n + column.to(tl.int64) * stride_d
        x = tl.load(features_ptr + at_x, mask=column < d, other=0.0).to(tl.float32)
        weighted += weight * x
        plain += x
        total += weight
    count = (end - begin).to(tl.float32)
    # a token that stays as it is must not be multiplied and divided by its weight
    even = (total <= 0) | (total == float("inf")) | (count == 1)
    folded = tl.where(even, plain / count, weighted / tl.where(even, 1.0, total))
    tl.store(out_ptr + row * d + column, folded, mask=column < d)
