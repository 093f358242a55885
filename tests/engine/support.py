"""What tests of the cache ask of vLLM."""

from __future__ import annotations

import torch


def cpu_isa(dtype: torch.dtype, block_size: int, head_size: int) -> str:
    """Return the instruction set that orders the rows of a block on this CPU."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return _get_attn_isa(dtype, block_size, head_size)
