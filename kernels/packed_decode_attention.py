"""packed_decode_attention: attention over packed and dense blocks of a paged KV cache (ThinK).

A block and head of the cache `[B, h, S, 2d]` has `S * 2d` elements. In a dense block they are `S`
rows `[key, value]`, one per slot. In a packed block tokens keep `width` of the `2d` elements each,
row after row: element `i` of token `t` is element `t * width + i` of the block, and a block holds
`S * 2d // width` tokens. Which elements a request keeps in a head is said by `places`: where
element `j` of `[key, value]` lies in the packed row, or -1 if it was dropped. A dropped element is
zero.

A request's block table begins with its packed blocks; dense ones follow. One online softmax runs
over both, with one scale, that of the full head size (ThinK, arXiv 2407.21018: the pruned and the
dense logits are concatenated). A query without a key, or with -inf alone among its logits, gets
zeros; NaN or +inf among them makes the result of its own query head NaN.

The kernel reads the bytes that are kept and expands them in registers: one program per query row,
KV head and split of its keys serves all query heads of the group; a second kernel merges splits.
"""

import math

import torch
from torch import Tensor

from tokenprune.kernels.ops.backend import ceil_div, choose_backend, describe

# columns of `rows`: row of the query, request, packed blocks, dense tokens, width
ROW_FIELDS = 5


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
            elements of a packed token. A row outside of `query` makes it nothing to do.
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
    from tokenprune.kernels.ops.triton.packed_decode_attention import (
        packed_decode_attention_triton,
    )

    return packed_decode_attention_triton(
        query, cache, blocks, rows, places, out, scale=scale, splits=splits
    )


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
        if not 0 <= token < len(query):
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
        logits = grouped @ keys.transpose(1, 2) * scale
        is_empty = (logits == -math.inf).all(dim=-1, keepdim=True)
        probs = torch.softmax(logits, dim=-1).masked_fill(is_empty, 0.0)
        out[token] = (probs @ values).flatten(0, 1).to(out.dtype)
    return out


def pack(tokens: Tensor, kept: Tensor, block_size: int) -> Tensor:
    """Return the packed blocks of tokens, the inverse of which is in `places_of`.

    Args:
        tokens: `[h, n, 2d]` keys and values; `n` a multiple of what a packed block holds.
        kept: `[h, width]` int64, which elements of a token each head keeps.
        block_size: `S`.

    Returns:
        `[blocks, h, S, 2d]`; what is after the last token of a block is zero.
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
