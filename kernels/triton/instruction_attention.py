"""The kernels of instruction_attention: the log-sum-exp of each row, then column sums."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.kernels.ops.backend import ceil_div, device_guard, next_power_of_2

# programs that keep a large GPU busy in the first pass
WANTED_PROGRAMS = 512
MAX_SPLITS = 16


def instruction_attention_triton(
    q: Tensor, k: Tensor, q_rows: Tensor, visual: Tensor, *, scale: float
) -> Tensor:
    """Compute `instruction_attention` with Triton; arguments and result are its own."""
    if q.dtype == torch.float64:
        q, k = q.float(), k.float()
    hq, t, dh = q.shape
    hkv, n, _ = k.shape
    rows = hq // hkv * t  # rows that share a KV head's keys
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
    """Write each row's log2 of the sum over one split of the keys of 2 to the logit."""
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    # [BLOCK_M], heads of the group first
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
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
    # a NaN in `total` passes on: it tells the second pass that the row is undefined
    has_key = total != 0
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
    """Write the column sums of the attention, of a tile of visual keys of one KV head."""
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
        # -inf where the row has no key, NaN where one of its logits is NaN or +inf
        is_defined = lse > float("-inf")
        seen = is_defined[:, None] & (key[None, :] <= last_key[:, None])
        # masked before exp2: a key the row may not see can overflow it
        logits = tl.where(seen, logits - lse[:, None], float("-inf"))
        mass += tl.sum(tl.exp2(logits), axis=0)
    at_mass = kv_head * num_visual + column
    tl.store(mass_ptr + at_mass, mass / num_weights, mask=in_column)
