"""instruction_attention: the attention the text rows pay to each visual token (IGA).

    score_j = mean over heads h and rows i of softmax_j(scale * q_hi . k_j),   j visual

The softmax runs over every key its row may see (causal), not over the visual ones alone, so the
scores add up to at most 1. Head h reads KV head h // (hq / hkv). A row of a head whose softmax is
undefined (it sees no key, or NaN or +inf among its logits, or -inf alone) contributes nothing, so
scores are always finite.

Source: TransPrune, arXiv 2507.20630, eq. 6; code liaolea/TransPrune@c9e8284. We follow the code,
because the paper leaves the heads' reduction and the set of keys open.
The kernel makes two passes over the keys (log-sum-exp of each row, then column sums) in float32
without atomics: equal inputs give equal bits, and the reference differs by rounding only.
"""

import math

import torch
from torch import Tensor

from tokenprune.kernels.ops.backend import choose_backend, describe

# attention weights the reference holds at once: 16 MiB of float32, or one row if that is more
MAX_SCRATCH = 1 << 22


def instruction_attention(
    q: Tensor,
    k: Tensor,
    q_rows: Tensor,
    visual: Tensor,
    *,
    scale: float,
    backend: str | None = None,
) -> Tensor:
    """Score the visual tokens by the mean attention of the text rows.

    Args:
        q: `[hq, t, dh]` queries of the text rows, after RoPE; any float dtype, any strides.
        k: `[hkv, n, dh]` keys of the sequence, dtype of `q`; `hq` is a multiple of `hkv`.
        q_rows: `[t]` int32 or int64, the row each query has in the sequence: its last visible key.
            A negative one sees none.
        visual: `[n]` bool, true for visual tokens. Counting them synchronises with the GPU.
        scale: Factor of the logits, usually `dh ** -0.5`.
        backend: `torch`, `triton` (CUDA, or the interpreter), or None to choose by device.

    Returns:
        `[n_visual]` float32 in the order of the keys; empty without visual tokens.

    Raises:
        ValueError: A shape, dtype, device or name is not as above, or there is no text row.
    """
    _check(q, k, q_rows, visual)
    if choose_backend(backend, q.device) == "torch":
        return instruction_attention_reference(q, k, q_rows, visual, scale=scale).float()
    from tokenprune.kernels.ops.triton.instruction_attention import instruction_attention_triton

    return instruction_attention_triton(q, k, q_rows, visual, scale=scale)


def instruction_attention_reference(
    q: Tensor, k: Tensor, q_rows: Tensor, visual: Tensor, *, scale: float
) -> Tensor:
    """Compute `instruction_attention` in torch: in float32, or in float64 for float64 inputs.

    Besides one KV head's queries and keys it holds three buffers of `MAX_SCRATCH` weights at most.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    hq, t, dh = q.shape
    hkv, n, _ = k.shape
    group = hq // hkv
    rows_per_block = max(MAX_SCRATCH // max(n, 1), 1)
    position = torch.arange(n, device=q.device)
    last_key = q_rows.repeat(group)[:, None]
    mass = torch.zeros(n, dtype=dtype, device=q.device)
    for kv_head in range(hkv):
        keys = k[kv_head].to(dtype)
        queries = q[kv_head * group : (kv_head + 1) * group].reshape(group * t, dh).to(dtype)
        for block in range(0, group * t, rows_per_block):
            rows = slice(block, block + rows_per_block)
            logits = (queries[rows] @ keys.T) * scale
            logits = logits.masked_fill(position > last_key[rows], -math.inf)
            # a softmax is NaN as a whole or not at all
            mass += torch.softmax(logits, dim=-1).nan_to_num(nan=0.0).sum(0)
    return mass[visual] / (hq * t)


def _check(q: Tensor, k: Tensor, q_rows: Tensor, visual: Tensor) -> None:
    if q.ndim != 3 or not q.is_floating_point():
        raise ValueError(f"q must be 3-D [hq, t, dh] of a float dtype, got {describe(q)}")
    hq, t, dh = q.shape
    if t == 0:
        raise ValueError(
            f"q must have at least one text row, got {describe(q)}; "
            "without text after the image there is no instruction to score by"
        )
    if k.ndim != 3 or k.shape[2] != dh or k.dtype != q.dtype or k.device != q.device:
        raise ValueError(
            f"k must be 3-D [hkv, n, {dh}] with the dtype and device of q, {describe(q)}, "
            f"got {describe(k)}"
        )
    hkv, n, _ = k.shape
    if hkv == 0 or hq == 0 or hq % hkv:
        raise ValueError(f"query heads must be a multiple of KV heads, got hq={hq}, hkv={hkv}")
    if q_rows.shape != (t,) or q_rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"q_rows must be int32 or int64 [{t}], one entry per row of q, got {describe(q_rows)}"
        )
    if visual.shape != (n,) or visual.dtype != torch.bool:
        raise ValueError(
            f"visual must be a bool mask [{n}], one entry per key, got {describe(visual)}"
        )
    for name, tensor in (("q_rows", q_rows), ("visual", visual)):
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {tensor.device}")
