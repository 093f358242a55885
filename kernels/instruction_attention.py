"""instruction_attention: the attention the text rows pay to each visual token (IGA).

    score_j = mean over heads h and rows i of softmax_j(scale * q_hi . k_j),   j visual

The softmax runs over every key its row may see (causal), not over the visual ones alone, so the
scores add up to at most 1. Head h reads KV head h // (hq / hkv).

Source: TransPrune, arXiv 2507.20630, eq. 6; code liaolea/TransPrune@c9e8284. We follow the code,
because the paper leaves the heads' reduction and the set of keys open.
The kernel makes two passes over the keys (log-sum-exp of each row, then column sums) in float32
without atomics: equal inputs give equal bits, and the reference differs by rounding only.
"""

import functools
import math
from typing import TYPE_CHECKING, Any, no_type_check

import torch
from torch import Tensor

from tokenprune.kernels.ops.backend import (
    ceil_div,
    choose_backend,
    describe,
    device_guard,
    next_power_of_2,
)

if TYPE_CHECKING:
    import triton.language as tl  # noqa: F401 - mypy resolves the annotations of the kernels

# attention weights the reference holds at once: 16 MiB of float32, or one row if that is more
MAX_SCRATCH = 1 << 22
# programs that keep a large GPU busy in the first pass
WANTED_PROGRAMS = 512
MAX_SPLITS = 16


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
        visual: `[n]` bool, true for visual tokens. Counting them synchronises with the GPU.
        scale: Factor of the logits, usually `dh ** -0.5`.
        backend: `torch`, `triton` (CUDA, or the interpreter), or None to choose by device.

    Returns:
        `[n_visual]` float32 in the order of the keys; empty without visual tokens.

    Raises:
        ValueError: A shape, dtype, device or name is not as above, or there is no text row.
            Negative values of `q_rows` are not checked: that would synchronise with the GPU.
    """
    _check(q, k, q_rows, visual)
    if choose_backend(backend, q.device) == "torch":
        return instruction_attention_reference(q, k, q_rows, visual, scale=scale).float()
    return _instruction_attention_triton(q, k, q_rows, visual, scale=scale)


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
            mass += torch.softmax(logits, dim=-1).sum(0)
    return mass[visual] / (hq * t)


def _instruction_attention_triton(
    q: Tensor, k: Tensor, q_rows: Tensor, visual: Tensor, *, scale: float
) -> Tensor:
    if q.dtype == torch.float64:
        q, k = q.float(), k.float()
    hq, t, dh = q.shape
    hkv, n, _ = k.shape
    rows = hq // hkv * t  # rows that share a KV head's keys
    lse_kernel, mass_kernel = _kernels()
    block_dh = max(next_power_of_2(dh), 16)
    # a tile of keys takes 16 KiB, so that two stages of them fit into shared memory
    block_n = min(max(16384 // (block_dh * q.element_size()), 16), 64)
    block_m = min(max(next_power_of_2(rows), 16), 64)
    row_tiles, key_tiles = ceil_div(rows, block_m), ceil_div(n, block_n)
    # few heads and rows leave a GPU idle, so several programs share a row's keys
    wanted = min(ceil_div(WANTED_PROGRAMS, row_tiles * hkv), MAX_SPLITS, max(key_tiles, 1))
    splits = 1 << (wanted.bit_length() - 1)
    tiles: dict[str, Any] = {
        # triton's interpreter multiplies the bit patterns of bfloat16 as integers
        "WIDEN": q.dtype == torch.bfloat16 and not q.is_cuda,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_DH": block_dh,
        "num_warps": 4,
        "num_stages": 2,
    }
    lse = torch.empty(splits, hq, t, dtype=torch.float32, device=q.device)
    q_rows = q_rows.contiguous()
    with device_guard(q):
        lse_kernel[(row_tiles, hkv, splits)](
            *(q, k, q_rows),  # inputs
            lse,  # output
            *(n, t, dh, rows, *q.stride(), *k.stride()),
            *(scale * math.log2(math.e), ceil_div(key_tiles, splits) * block_n),
            **tiles,
        )
        # waits for the stream, so it comes after the first pass is under way
        visual_keys = visual.nonzero().squeeze(1)
        num_visual = len(visual_keys)
        mass = torch.empty(hkv, num_visual, dtype=torch.float32, device=q.device)
        mass_kernel[(ceil_div(num_visual, block_n), hkv)](
            *(q, k, q_rows, visual_keys, lse),  # inputs
            mass,  # output
            *(num_visual, t, dh, rows, *q.stride(), *k.stride()),
            *(scale * math.log2(math.e), hq * t),
            SPLITS=splits,
            **tiles,
        )
    return mass.sum(0)


@functools.cache
@no_type_check
def _kernels():
    # triton is imported and its kernels are decorated on first use: the torch form needs neither
    global tl
    import triton
    import triton.language as tl

    @triton.jit
    def lse_kernel(
        q_ptr,
        k_ptr,
        q_rows_ptr,
        lse_ptr,
        n,
        t,
        dh,
        rows,
        stride_q_h,
        stride_q_t,
        stride_q_d,
        stride_k_h,
        stride_k_n,
        stride_k_d,
        scale_log2,
        keys_per_split,
        WIDEN: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_DH: tl.constexpr,
    ):
        kv_head = tl.program_id(1).to(tl.int64)
        split = tl.program_id(2)
        row = tl.program_id(0) * BLOCK_M + tl.arange(
            0, BLOCK_M
        )  # [BLOCK_M], heads of the group first
        in_row = row < rows
        dim = tl.arange(0, BLOCK_DH)  # [BLOCK_DH]
        head = kv_head * (rows // t) + row // t
        at_q = head[:, None] * stride_q_h + (row % t).to(tl.int64)[:, None] * stride_q_t
        in_q = in_row[:, None] & (dim < dh)[None, :]
        q = tl.load(q_ptr + at_q + dim[None, :] * stride_q_d, mask=in_q, other=0.0)
        last_key = tl.load(q_rows_ptr + row % t, mask=in_row, other=-1).to(tl.int32)
        last_key = tl.minimum(last_key, n - 1)
        if WIDEN:
            q = q.to(tl.float32)

        # finite, so that a row without a key in this split never computes -inf - -inf
        peak = tl.full([BLOCK_M], -1e38, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        first = split * keys_per_split
        end = tl.minimum(first + keys_per_split, tl.max(last_key, axis=0) + 1)
        for start in range(first, end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            at_k = kv_head * stride_k_h + key.to(tl.int64)[None, :] * stride_k_n
            in_k = (dim < dh)[:, None] & (key < n)[None, :]
            k = tl.load(k_ptr + at_k + dim[:, None] * stride_k_d, mask=in_k, other=0.0)
            if WIDEN:
                k = k.to(tl.float32)
            logits = tl.dot(q, k, input_precision="tf32x3") * scale_log2  # [BLOCK_M, BLOCK_N]
            logits = tl.where(key[None, :] <= last_key[:, None], logits, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(logits, axis=1))
            total *= tl.exp2(peak - new_peak)
            total += tl.sum(tl.exp2(logits - new_peak[:, None]), axis=1)
            peak = new_peak
        has_key = total > 0
        lse = tl.where(has_key, peak + tl.log2(tl.where(has_key, total, 1.0)), float("-inf"))
        at_lse = (split.to(tl.int64) * tl.num_programs(1) + kv_head) * rows + row
        tl.store(lse_ptr + at_lse, lse, mask=in_row)

    @triton.jit
    def mass_kernel(
        q_ptr,
        k_ptr,
        q_rows_ptr,
        visual_keys_ptr,
        lse_ptr,
        mass_ptr,
        num_visual,
        t,
        dh,
        rows,
        stride_q_h,
        stride_q_t,
        stride_q_d,
        stride_k_h,
        stride_k_n,
        stride_k_d,
        scale_log2,
        num_weights,
        SPLITS: tl.constexpr,
        WIDEN: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_DH: tl.constexpr,
    ):
        kv_head = tl.program_id(1).to(tl.int64)
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        in_column = column < num_visual
        # columns past the end stand after every row, which hides them
        key = tl.load(visual_keys_ptr + column, mask=in_column, other=2147483647)
        dim = tl.arange(0, BLOCK_DH)  # [BLOCK_DH]
        at_k = kv_head * stride_k_h + key[None, :] * stride_k_n + dim[:, None] * stride_k_d
        k = tl.load(k_ptr + at_k, mask=(dim < dh)[:, None] & in_column[None, :], other=0.0)
        if WIDEN:
            k = k.to(tl.float32)

        mass = tl.zeros([BLOCK_N], tl.float32)
        split = tl.arange(0, SPLITS)  # [SPLITS]
        for start in range(0, rows, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
            in_row = row < rows
            at_lse = (split.to(tl.int64) * tl.num_programs(1) + kv_head)[:, None] * rows
            parts = tl.load(lse_ptr + at_lse + row[None, :], mask=in_row[None, :], other=0.0)
            peak = tl.max(parts, axis=0)
            lse = peak + tl.log2(tl.sum(tl.exp2(parts - peak[None, :]), axis=0))

            head = kv_head * (rows // t) + row // t
            at_q = head[:, None] * stride_q_h + (row % t).to(tl.int64)[:, None] * stride_q_t
            in_q = in_row[:, None] & (dim < dh)[None, :]
            q = tl.load(q_ptr + at_q + dim[None, :] * stride_q_d, mask=in_q, other=0.0)
            last_key = tl.load(q_rows_ptr + row % t, mask=in_row, other=-1)
            if WIDEN:
                q = q.to(tl.float32)
            logits = tl.dot(q, k, input_precision="tf32x3") * scale_log2  # [BLOCK_M, BLOCK_N]
            # masked before exp2: a key the row may not see can overflow it
            logits = tl.where(key[None, :] <= last_key[:, None], logits, float("-inf"))
            mass += tl.sum(tl.exp2(logits - lse[:, None]), axis=0)
        at_mass = kv_head * num_visual + column
        tl.store(mass_ptr + at_mass, mass / num_weights, mask=in_column)

    return lse_kernel, mass_kernel


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
