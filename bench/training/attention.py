"""Masked attention for training on a CPU.

PyTorch's fused CPU kernel spends twice the time of plain products on its backward pass at the
lengths trained here, so short sequences take plain products; long ones, where the scores would not
fit the cache, and other devices take the fused one.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NAME = "demo_model_training"
_LONGEST_PLAIN = 1024


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return attention `[B, L, H, D]` of `query` `[B, H, L, D]`, as transformers expects it.

    Args:
        module: The layer, not needed.
        query: `[B, H, L, D]`.
        key: `[B, K, L, D]` with `H` a multiple of `K`.
        value: Like `key`.
        attention_mask: `[B, 1, L, L]`, 0 or minus infinity, or None to see everything.
        scaling: Factor of the scores.
    """
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    scaling = width**-0.5 if scaling is None else scaling
    if query.device.type != "cpu" or length > _LONGEST_PLAIN:
        group = heads // kv_heads
        output = functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(group, 1),
            value.repeat_interleave(group, 1),
            attn_mask=None if attention_mask is None else attention_mask.to(query.dtype),
            scale=scaling,
        )
        return output.transpose(1, 2), None
    # the heads of a group share their keys: one product for all of them
    grouped = (query * scaling).reshape(batch, kv_heads, -1, width)
    scores = (grouped @ key.transpose(-1, -2)).view(batch, heads, length, -1)
    if attention_mask is not None:
        scores = scores + attention_mask.to(scores.dtype)
    weights = torch.softmax(scores, -1, dtype=scores.dtype).view(batch, kv_heads, -1, key.shape[2])
    return (weights @ value).view(batch, heads, length, width).transpose(1, 2), None


def register() -> str:
    """Make the function known to transformers and return its name there."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    return NAME
