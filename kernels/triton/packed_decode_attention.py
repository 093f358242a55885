"""The kernels of packed_decode_attention: the splits of each row, then their merging.

Kept bytes are read as they are and expanded in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenprune.kernels.ops.backend import device_guard, next_power_of_2

MAX_SPLITS = 16


def packed_decode_attention_triton(
    query: Tensor,
    cache: Tensor,
    blocks: Tensor,
    rows: Tensor,
    places: Tensor,
    out: Tensor,
    *,
    scale: float,
    splits: int | None,
) -> Tensor:
    """Compute `packed_decode_attention` with Triton; arguments and result are its own."""
    count, (heads, block_size) = rows.shape[0], cache.shape[1:3]
    if count == 0:
        return out
    if splits is None:
        splits = _splits(count * heads, cache.device)
    hq, d = query.shape[1:]
    group = hq // heads
    block_d = next_power_of_2(d)
    parts, stats = query, query
    if splits > 1:
        parts = torch.empty((count, hq, splits, d), dtype=torch.float32, device=cache.device)
        stats = torch.empty((count, hq, splits, 2), dtype=torch.float32, device=cache.device)
    with device_guard(cache):
        attention_kernel[(count, heads, splits)](
            *(query, cache, blocks, rows, places),
            *(out, parts, stats),
            scale,
            *(query.shape[0], block_size, d, group),
            *query.stride()[:2],
            *cache.stride()[:3],
            *(blocks.stride(0), *places.stride()[:2]),
            *out.stride()[:2],
            SPLITS=splits,
            FIELDS=rows.shape[1],
            BLOCK_T=32 if query.dtype == torch.float32 or block_d > 128 else 64,
            # the least that matrix units take
            BLOCK_G=max(16, next_power_of_2(group)),
            BLOCK_D=max(16, block_d),
            # triton's interpreter multiplies the bit patterns of bfloat16 as integers
            WIDEN=query.dtype == torch.bfloat16 and not query.is_cuda,
        )
        if splits > 1:
            merge_kernel[(count, hq)](
                *(rows, parts, stats, out),
                *(query.shape[0], d),
                *out.stride()[:2],
                SPLITS=splits,
                FIELDS=rows.shape[1],
                BLOCK_S=next_power_of_2(splits),
                BLOCK_D=block_d,
            )
    return out


def _splits(programs: int, device: torch.device) -> int:
    """Return how many programs share a row's keys so that two are there per multiprocessor."""
    if device.type != "cuda":
        return 1
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(MAX_SPLITS, wanted // programs))


@triton.jit
def _accumulate(q, k, v, valid, scale, acc, total, top, WIDEN: tl.constexpr):
    """One tile of the online softmax; at least one of its keys is valid."""
    if WIDEN:
        q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
    # [BLOCK_G, BLOCK_T]
    logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
    logits = tl.where(valid[None, :], logits, float("-inf"))
    higher = tl.maximum(top, tl.max(logits, axis=1))
    shrink = tl.exp(top - higher)
    weights = tl.exp(logits - higher[:, None])
    mixed = tl.dot(weights.to(v.dtype), v, input_precision="tf32x3")
    return acc * shrink[:, None] + mixed, total * shrink + tl.sum(weights, axis=1), higher


# the number of rows changes from step to step: no step compiles a kernel for its own
@triton.jit(do_not_specialize=["num_tokens"])
def attention_kernel(
    q_ptr,
    cache_ptr,
    blocks_ptr,
    rows_ptr,
    places_ptr,
    out_ptr,
    parts_ptr,
    stats_ptr,
    scale,
    num_tokens,
    block_size,
    d,
    group,
    stride_qt,
    stride_qh,
    stride_cb,
    stride_ch,
    stride_cs,
    stride_r,
    stride_pr,
    stride_ph,
    stride_ot,
    stride_oh,
    SPLITS: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attend with one row and group of heads to one split of the keys."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    rows_ptr += row * FIELDS
    token = tl.load(rows_ptr).to(tl.int64)
    if (token >= 0) & (token < num_tokens):
        request = tl.load(rows_ptr + 1).to(tl.int64)
        packed_blocks = tl.load(rows_ptr + 2)
        dense = tl.load(rows_ptr + 3)
        width = tl.load(rows_ptr + 4)
        full = 2 * d
        per_block = block_size * full // width
        packed = packed_blocks * per_block
        packed_tiles = tl.cdiv(packed, BLOCK_T)
        tiles = packed_tiles + tl.cdiv(dense, BLOCK_T)
        share = tl.cdiv(tiles, SPLITS)
        first = split * share
        last = tl.minimum(first + share, tiles)

        cols = tl.arange(0, BLOCK_D)  # [BLOCK_D]
        in_row = cols < d
        members = tl.arange(0, BLOCK_G)  # [BLOCK_G]
        in_group = members < group
        heads_of_group = head * group + members
        q_at = token * stride_qt + heads_of_group[:, None] * stride_qh + cols[None, :]
        in_q = in_group[:, None] & in_row[None, :]
        q = tl.load(q_ptr + q_at, mask=in_q, other=0.0)  # [BLOCK_G, BLOCK_D]
        places_ptr += request * stride_pr + head * stride_ph
        key_place = tl.load(places_ptr + cols, mask=in_row, other=-1).to(tl.int32)
        value_place = tl.load(places_ptr + d + cols, mask=in_row, other=-1).to(tl.int32)
        blocks_ptr += request * stride_r
        cache_ptr += head * stride_ch

        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        # finite, so that tiles of nothing but -inf add nothing
        top = tl.full([BLOCK_G], -1e38, tl.float32)
        for tile in range(first, tl.minimum(last, packed_tiles)):
            tokens = tile * BLOCK_T + tl.arange(0, BLOCK_T)
            valid = tokens < packed
            block = tl.load(blocks_ptr + tokens // per_block, mask=valid, other=0)
            base = (cache_ptr + block.to(tl.int64) * stride_cb)[:, None]
            begin = ((tokens % per_block) * width)[:, None]
            at = begin + key_place[None, :]
            there = valid[:, None] & (key_place >= 0)[None, :]
            k = tl.load(base + (at // full) * stride_cs + at % full, mask=there, other=0.0)
            at = begin + value_place[None, :]
            there = valid[:, None] & (value_place >= 0)[None, :]
            v = tl.load(base + (at // full) * stride_cs + at % full, mask=there, other=0.0)
            acc, total, top = _accumulate(q, k, v, valid, scale, acc, total, top, WIDEN)
        for tile in range(tl.maximum(first, packed_tiles), last):
            tokens = (tile - packed_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
            valid = tokens < dense
            at = blocks_ptr + packed_blocks + tokens // block_size
            block = tl.load(at, mask=valid, other=0).to(tl.int64)
            slot = block * stride_cb + (tokens % block_size) * stride_cs
            base = (cache_ptr + slot)[:, None] + cols[None, :]
            there = valid[:, None] & in_row[None, :]
            k = tl.load(base, mask=there, other=0.0)
            v = tl.load(base + d, mask=there, other=0.0)
            acc, total, top = _accumulate(q, k, v, valid, scale, acc, total, top, WIDEN)

        if SPLITS == 1:
            at = token * stride_ot + heads_of_group[:, None] * stride_oh + cols[None, :]
            # without a key the sum is zero; a NaN stays one
            mixed = acc / tl.where(total == 0, 1.0, total)[:, None]
            tl.store(out_ptr + at, mixed.to(out_ptr.dtype.element_ty), mask=in_q)
        else:
            part = (row * tl.num_programs(1) * group + heads_of_group) * SPLITS + split
            tl.store(parts_ptr + part[:, None] * d + cols[None, :], acc, mask=in_q)
            tl.store(stats_ptr + part * 2, top, mask=in_group)
            tl.store(stats_ptr + part * 2 + 1, total, mask=in_group)


@triton.jit(do_not_specialize=["num_tokens"])
def merge_kernel(
    rows_ptr,
    parts_ptr,
    stats_ptr,
    out_ptr,
    num_tokens,
    d,
    stride_ot,
    stride_oh,
    SPLITS: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merge the splits of one row and query head."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    token = tl.load(rows_ptr + row * FIELDS).to(tl.int64)
    if (token >= 0) & (token < num_tokens):
        splits = tl.arange(0, BLOCK_S)
        there = splits < SPLITS
        cols = tl.arange(0, BLOCK_D)
        in_row = cols < d
        part = (row * tl.num_programs(1) + head) * SPLITS + splits
        top = tl.load(stats_ptr + part * 2, mask=there, other=-1e38)
        total = tl.load(stats_ptr + part * 2 + 1, mask=there, other=0.0)
        # a split without keys has -1e38 here and sums of zero
        weight = tl.exp(top - tl.max(top, axis=0))
        at = part[:, None] * d + cols[None, :]
        acc = tl.load(parts_ptr + at, mask=there[:, None] & in_row[None, :], other=0.0)
        whole = tl.sum(total * weight, axis=0)
        mixed = tl.sum(acc * weight[:, None], axis=0) / tl.where(whole == 0, 1.0, whole)
        at = token * stride_ot + head * stride_oh + cols
        tl.store(out_ptr + at, mixed.to(out_ptr.dtype.element_ty), mask=in_row)
