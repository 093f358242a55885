"""The kernel of patch_entropy: one program per patch compares its pixels with each other."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.kernels.ops.backend import device_guard, next_power_of_2


def entropy(grey: Tensor) -> Tensor:
    """Return the entropy in bits of each row of `[patches, pixels]` uint8, `[patches]` float32."""
    patches, pixels = grey.shape
    out = torch.empty(patches, dtype=torch.float32, device=grey.device)
    with device_guard(grey):
        entropy_kernel[(patches,)](
            *(grey, out, pixels),
            BLOCK_P=next_power_of_2(pixels),
            BLOCK_J=min(next_power_of_2(pixels), 32),
        )
    return out


@triton.jit
def entropy_kernel(grey_ptr, out_ptr, pixels, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr):
    """Write the entropy of one patch: log2 P - mean over its pixels of log2 of the equal ones."""
    start = tl.program_id(0).to(tl.int64) * pixels
    at = tl.arange(0, BLOCK_P)  # [BLOCK_P]
    mine = tl.load(grey_ptr + start + at, mask=at < pixels, other=0).to(tl.int32)
    equal = tl.zeros([BLOCK_P], tl.int32)
    for first in range(0, pixels, BLOCK_J):
        other_at = first + tl.arange(0, BLOCK_J)  # [BLOCK_J]
        # a value that no pixel has stands for what lies after the patch
        other = tl.load(grey_ptr + start + other_at, mask=other_at < pixels, other=0)
        other = tl.where(other_at < pixels, other.to(tl.int32), -1)
        equal += tl.sum((mine[:, None] == other[None, :]).to(tl.int32), axis=1)
    bits = tl.where(at < pixels, tl.log2(tl.maximum(equal, 1).to(tl.float32)), 0.0)
    # one pixel is a constant to the compiler, and a constant has no `to`
    count = tl.cast(pixels, tl.float32)
    # rounding must not make the entropy of a patch of one colour negative
    entropy = tl.maximum(tl.log2(count) - tl.sum(bits, axis=0) / count, 0.0)
    tl.store(out_ptr + tl.program_id(0), entropy)
