"""patch_entropy: how varied the grey values of each patch are.

    H = - sum over values v of p_v log2 p_v,    p_v = share of the patch's pixels with grey value v

The grey value of a pixel is the mean of its three channels, rounded down to one of 256 values.

Source: VFlowOpt, arXiv 2508.05211, the local information of its importance map, in bits as in the
released code (sihany077/VFlowOpt@129eeef). That code takes normalised pixels for raw ones, so
values 128 apart fall together; here the pixels are raw.
The kernel counts, for each pixel, the pixels of its patch that are equal to it, which needs no
histogram: H = log2 P - mean over pixels of log2(count).
"""

import torch
from torch import Tensor

from tokenprune.kernels.ops.backend import choose_backend, describe


def patch_entropy(image: Tensor, patch: int, *, backend: str | None = None) -> Tensor:
    """Compute the entropy of each whole patch of an image.

    Args:
        image: `[3, H, W]` uint8, raw pixels; any strides.
        patch: Side of a patch in pixels; what is left over at the right and the bottom is not
            looked at, as in the patch embedding of a vision tower.
        backend: `torch`, `triton` (CUDA, or the interpreter), or None to choose by device.

    Returns:
        `[(H // patch) * (W // patch)]` float32 bits, row by row.

    Raises:
        ValueError: A shape, dtype or name is not as above.
    """
    _check(image, patch)
    if choose_backend(backend, image.device) == "torch":
        return patch_entropy_reference(image, patch).float()
    from tokenprune.kernels.ops.triton.patch_entropy import entropy

    return entropy(_grey_patches(image, patch).to(torch.uint8).contiguous())


def patch_entropy_reference(image: Tensor, patch: int) -> Tensor:
    """Compute `patch_entropy` in torch, in float64."""
    grey = _grey_patches(image, patch)
    ones = torch.ones_like(grey, dtype=torch.float64)
    counts = torch.zeros(len(grey), 256, dtype=torch.float64, device=image.device)
    share = counts.scatter_add_(1, grey, ones) / grey.shape[1]
    return torch.special.entr(share).sum(1) / torch.log(share.new_tensor(2.0))


def _grey_patches(image: Tensor, patch: int) -> Tensor:
    """Return the grey values of each patch, int64 `[patches, patch * patch]`."""
    rows, cols = image.shape[1] // patch, image.shape[2] // patch
    grey = image[:, : rows * patch, : cols * patch].to(torch.int64).sum(0) // 3
    return grey.view(rows, patch, cols, patch).transpose(1, 2).reshape(rows * cols, -1)


def _check(image: Tensor, patch: int) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        raise ValueError(f"image must be uint8 [3, H, W], got {describe(image)}")
    if not 1 <= patch <= min(image.shape[1:]):
        raise ValueError(
            f"patch must be within 1..{min(image.shape[1:])}, the shorter side, got {patch}"
        )
