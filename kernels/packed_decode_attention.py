"""packed_decode_attention: attention over packed and dense blocks of a paged KV cache (ThinK).

A block and head of the cache `[B, h, S, 2d]` has `S * 2d` elements. In a dense block they are `S`
rows `[key, value]`, one per slot. In a packed block tokens keep `width` of the `2d` elements each,
row behind row: element `i` of token `t` is element `t * width + i` of the block, and a block holds
`S * 2d // width` tokens. Which elements a request keeps in a head is said by `places`: where
element `j` of `[key, value]` lies in the packed row, or -1 if it was dropped. A dropped element is
zero.

A request's block table begins with its packed blocks; dense ones follow. One online softmax runs
over both, with one scale, that of the full head size (ThinK, arXiv 2407.21018: the pruned and the
dense logits are concatenated).

The kernel reads the bytes that are kept and expands them in registers: one program per query row,
KV head and split of its keys serves all query heads of the group; a second kernel merges splits.
"""

import functools
from typing import TYPE_CHECKING, no_type_check

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

# columns of `rows`: row of the query, request, packed blocks, dense tokens, width
ROW_FIELDS = 5
MAX_SPLITS = 16


def packed_decode_attention(
    query: Tensor,
    cache: Tensor,
    blocks: Tensor,
    rows: Tensor,
    places: Tensor,
    out: Tensor,
    *,
    scale: float,
    dense_order: Tensor | None = None,
    splits: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend with some rows of `query`, and write their results into `out`.

    Args:
        query: `[t, hq, d]` RoPE applied; `hq` a multiple of `h`.
        cache: `[B, h, S, 2d]`, dtype of `query`; any strides, the last one 1.
        blocks: `[R, m]` int32 block tables by request, packed blocks first.
        rows: `[r, 5]` int32: row of `query` and `out`, request, packed blocks, dense tokens, and
            elements of a packed token. A negative row of `query` makes it nothing to do.
        places: `[R, h, 2d]` int16, see above.
        out: `[t, hq, d]`, dtype of `query`; rows that are not named are left alone.
        scale: What logits are multiplied with.
        dense_order: `[S, 2d]` int64, where each element of a dense block's rows lies in the
            block; None for in order. Torch only.
        splits: Programs that share the keys of one row and head; None chooses by the device.
        backend: `torch`, `triton` (CUDA, or the interpreter), or None to choose by device.

    Returns:
        `out`.

    Raises:
        ValueError: A shape, dtype or stride is not as above.
            Indices and counts are not checked: that would synchronise with the GPU.
    """
    _check(query, cache, blocks, rows, places, out)
    if choose_backend(backend, cache.device) == "torch":
        return packed_decode_attention_reference(
            query, cache, blocks, rows, places, out, scale=scale, dense_order=dense_order
        )
    if dense_order is not None:
        raise ValueError("dense_order must be None for backend='triton'; use backend='torch'")
    return _attention_triton(query, cache, blocks, rows, places, out, scale, splits)


def packed_decode_attention_reference(
    query: Tensor,
    cache: Tensor,
    blocks: Tensor,
    rows: Tensor,
    places: Tensor,
    out: Tensor,
    *,
    scale: float,
    dense_order: Tensor | None = None,
) -> Tensor:
    """Compute `packed_decode_attention` in torch: in float32, or in float64 for float64 inputs."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads, block_size = cache.shape[1:3]
    for token, request, packed, dense, width in rows.tolist():
        if token < 0:
            continue
        table = blocks[request].long()
        last = packed + ceil_div(dense, block_size)
        keys, values = (
            torch.cat(
                [
                    _unpacked(cache[table[:packed]], places[request].long(), width),
                    _dense(cache[table[packed:last]], dense_order)[:, :dense],
                ],
                dim=1,
            )
            .to(dtype)
            .chunk(2, dim=2)
        )  # [h, n, d]
        grouped = query[token].view(heads, -1, query.shape[2]).to(dtype)  # [h, g, d]
        probs = torch.softmax(grouped @ keys.transpose(1, 2) * scale, dim=-1)
        out[token] = (probs @ values).flatten(0, 1).to(out.dtype)
    return out


def pack(tokens: Tensor, kept: Tensor, block_size: int) -> Tensor:
    """Return the packed blocks of tokens, the inverse of which is in `places_of`.

    Args:
        tokens: `[h, n, 2d]` keys and values; `n` a multiple of what a packed block holds.
        kept: `[h, width]` int64, which elements of a token each head keeps.
        block_size: `S`.

    Returns:
        `[blocks, h, S, 2d]`; what is behind the last token of a block is zero.
    """
    heads, n, full = tokens.shape
    width = kept.shape[1]
    per_block = block_size * full // width
    rows = tokens.gather(2, kept[:, None].expand(-1, n, -1))
    stored = tokens.new_zeros((heads, n // per_block, block_size * full))
    stored[:, :, : per_block * width] = rows.reshape(heads, -1, per_block * width)
    return stored.view(heads, -1, block_size, full).transpose(0, 1)


def places_of(kept: Tensor, full: int) -> Tensor:
    """Return `[h, full]` int16 `places` of `[h, width]` kept elements."""
    heads, width = kept.shape
    places = torch.full((heads, full), -1, dtype=torch.int16, device=kept.device)
    order = torch.arange(width, dtype=torch.int16, device=kept.device)
    return places.scatter_(1, kept, order.expand(heads, -1))


def _unpacked(stored: Tensor, places: Tensor, width: int) -> Tensor:
    """Return `[h, n, 2d]` tokens of `[blocks, h, S, 2d]` packed blocks."""
    num_blocks, heads, block_size, full = stored.shape
    per_block = block_size * full // width
    stored = stored.transpose(0, 1).reshape(heads, num_blocks, block_size * full)
    stored = stored[..., : per_block * width]
    rows = stored.reshape(heads, num_blocks * per_block, width)
    index = places.clamp(min=0)[:, None].expand(-1, rows.shape[1], -1)
    return rows.gather(2, index).masked_fill((places < 0)[:, None], 0)


def _dense(stored: Tensor, order: Tensor | None) -> Tensor:
    """Return `[h, n, 2d]` rows of `[blocks, h, S, 2d]` dense blocks."""
    num_blocks, heads, block_size, full = stored.shape
    rows = stored.transpose(0, 1).reshape(heads, num_blocks, block_size * full)
    if order is not None:
        rows = rows[..., order.flatten()]
    return rows.reshape(heads, num_blocks * block_size, full)


def _attention_triton(
    query: Tensor,
    cache: Tensor,
    blocks: Tensor,
    rows: Tensor,
    places: Tensor,
    out: Tensor,
    scale: float,
    splits: int | None,
) -> Tensor:
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
        _kernels()[0][(count, heads, splits)](
            *(query, cache, blocks, rows, places),
            *(out, parts, stats),
            scale,
            *(block_size, d, group),
            *query.stride()[:2],
            *cache.stride()[:3],
            *(blocks.stride(0), *places.stride()[:2]),
            *out.stride()[:2],
            SPLITS=splits,
            FIELDS=ROW_FIELDS,
            BLOCK_T=32 if query.dtype == torch.float32 or block_d > 128 else 64,
            # the least that matrix units take
            BLOCK_G=max(16, next_power_of_2(group)),
            BLOCK_D=max(16, block_d),
            # triton's interpreter multiplies the bit patterns of bfloat16 as integers
            WIDEN=query.dtype == torch.bfloat16 and not query.is_cuda,
        )
        if splits > 1:
            _kernels()[1][(count, hq)](
                *(rows, parts, stats, out),
                d,
                *out.stride()[:2],
                SPLITS=splits,
                FIELDS=ROW_FIELDS,
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


@functools.cache
@no_type_check
def _kernels():
    # triton is imported and its kernels are decorated on first use: the torch form needs neither
    # and a kernel finds the functions it calls among the globals of its module
    global tl, _accumulate
    import triton
    import triton.language as tl

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

    @triton.jit
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
        row = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1).to(tl.int64)
        split = tl.program_id(2)
        rows_ptr += row * FIELDS
        token = tl.load(rows_ptr).to(tl.int64)
        if token >= 0:
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
            top = tl.full([BLOCK_G], float("-inf"), tl.float32)
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
                # rows beyond the group attended with a query of zeros, so no sum is zero
                mixed = acc / total[:, None]
                tl.store(out_ptr + at, mixed.to(out_ptr.dtype.element_ty), mask=in_q)
            else:
                part = (row * tl.num_programs(1) * group + heads_of_group) * SPLITS + split
                tl.store(parts_ptr + part[:, None] * d + cols[None, :], acc, mask=in_q)
                tl.store(stats_ptr + part * 2, top, mask=in_group)
                tl.store(stats_ptr + part * 2 + 1, total, mask=in_group)

    @triton.jit
    def merge_kernel(
        rows_ptr,
        parts_ptr,
        stats_ptr,
        out_ptr,
        d,
        stride_ot,
        stride_oh,
        SPLITS: tl.constexpr,
        FIELDS: tl.constexpr,
        BLOCK_S: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1).to(tl.int64)
        token = tl.load(rows_ptr + row * FIELDS).to(tl.int64)
        if token >= 0:
            splits = tl.arange(0, BLOCK_S)
            there = splits < SPLITS
            cols = tl.arange(0, BLOCK_D)
            in_row = cols < d
            part = (row * tl.num_programs(1) + head) * SPLITS + splits
            top = tl.load(stats_ptr + part * 2, mask=there, other=float("-inf"))
            total = tl.load(stats_ptr + part * 2 + 1, mask=there, other=0.0)
            # a split without keys has -inf here and weighs nothing
            weight = tl.exp(top - tl.max(top, axis=0))
            at = part[:, None] * d + cols[None, :]
            acc = tl.load(parts_ptr + at, mask=there[:, None] & in_row[None, :], other=0.0)
            mixed = tl.sum(acc * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
            at = token * stride_ot + head * stride_oh + cols
            tl.store(out_ptr + at, mixed.to(out_ptr.dtype.element_ty), mask=in_row)

    return attention_kernel, merge_kernel


def _check(
    query: Tensor, cache: Tensor, blocks: Tensor, rows: Tensor, places: Tensor, out: Tensor
) -> None:
    if cache.ndim != 4 or cache.stride(3) != 1 or cache.shape[3] % 2:
        raise ValueError(f"cache must be 4-D [B, h, S, 2d] with dense rows, got {describe(cache)}")
    heads, full = cache.shape[1], cache.shape[3]
    if query.ndim != 3 or query.shape[2] * 2 != full or query.shape[1] % heads:
        raise ValueError(
            f"query must be 3-D [t, hq, {full // 2}] with hq a multiple of {heads}, "
            f"got {describe(query)}"
        )
    if query.stride(2) != 1 or query.dtype != cache.dtype:
        raise ValueError(f"query must have dense rows of {cache.dtype}, got {describe(query)}")
    if out.shape != query.shape or out.dtype != query.dtype or out.stride(2) != 1:
        raise ValueError(f"out must be like query, {describe(query)}, got {describe(out)}")
    if blocks.ndim != 2 or blocks.dtype != torch.int32 or blocks.stride(1) != 1:
        raise ValueError(f"blocks must be 2-D int32 [R, m], got {describe(blocks)}")
    if rows.ndim != 2 or rows.shape[1] != ROW_FIELDS or rows.dtype != torch.int32:
        raise ValueError(f"rows must be int32 [r, {ROW_FIELDS}], got {describe(rows)}")
    if not rows.is_contiguous():
        raise ValueError(f"rows must be contiguous, got strides {rows.stride()}")
    if places.ndim != 3 or places.shape[1:] != (heads, full) or places.dtype != torch.int16:
        raise ValueError(f"places must be int16 [R, {heads}, {full}], got {describe(places)}")
    if places.stride(2) != 1:
        raise ValueError(f"places must have dense rows, got strides {places.stride()}")
