"""lag_compact: move kept rows of a paged KV cache towards the front, each KV head its own rows.

    cache[to(begin + j), h] = cache[from(source[h, j]), h]      j = 0, 1, ...

`from` and `to` look a cache index up in the block table that rows are read from, and in the one
they go to, which may be the same, or share blocks in the same places. Sources ascend and never lie
before their destination, so the rows can be moved in place, a tile at a time in ascending order:
what a tile overwrites, no later tile reads. Moves bytes and does no arithmetic: kernel and
reference agree exactly. One program per head and run of channels walks over the rows; scratch is
one tile.
"""

import torch
from torch import Tensor

from tokenprune.kernels.ops.backend import choose_backend, describe

# rows of each head that the reference holds at once
TILE = 2048


def lag_compact(
    cache: Tensor,
    blocks: Tensor,
    source: Tensor,
    begin: int,
    *,
    into: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Move rows of one request in one layer, in place or into other blocks.

    Args:
        cache: `[B, h, S, w]` blocks of `S` slots; a row holds the key and value of one token in
            one head. Any strides, the last one 1.
        blocks: `[num_blocks]` int32 or int64, the request's block table.
        source: `[h, m]` or `[1, m]` int64 cache indices, strictly ascending, `source[:, j]` at
            least `begin + j`. A single row stands for all heads.
        begin: Cache index of the first destination; `begin + m` at most what the blocks hold.
        into: `[num_blocks]` int32 or int64, the block table that rows go to; a block of `blocks`
            stands in no other place of it. None for `blocks` itself.
        backend: `torch`, `triton` (CUDA, or the interpreter), or None to choose by device.

    Raises:
        ValueError: A shape, dtype or stride is not as above.
            Indices are not checked: that would synchronise with the GPU.
    """
    if cache.ndim != 4 or cache.stride(3) != 1:
        raise ValueError(f"cache must be 4-D [B, h, S, w] with dense rows, got {describe(cache)}")
    if source.ndim != 2 or source.shape[0] not in (1, cache.shape[1]):
        raise ValueError(f"source must be [{cache.shape[1]} or 1, m], got {describe(source)}")
    if blocks.ndim != 1:
        raise ValueError(f"blocks must be 1-D, got {describe(blocks)}")
    name = "blocks" if into is None else "into"
    into = blocks if into is None else into
    slots, end = into.numel() * cache.shape[2], begin + source.shape[1]
    if into.ndim != 1 or not 0 <= begin <= end <= slots:
        raise ValueError(
            f"{name} must be 1-D and hold the destinations {begin}..{end - 1}, "
            f"got {describe(into)} with {slots} slots"
        )
    if choose_backend(backend, cache.device) == "torch":
        lag_compact_reference(cache, blocks, source, begin, into)
    else:
        from tokenprune.kernels.ops.triton.lag_compact import lag_compact_triton

        lag_compact_triton(cache, blocks, source, begin, into)


def lag_compact_reference(
    cache: Tensor, blocks: Tensor, source: Tensor, begin: int, into: Tensor | None = None
) -> None:
    """Compute `lag_compact` in torch, `TILE` rows of each head at a time."""
    block_size = cache.shape[2]
    heads = torch.arange(cache.shape[1], device=cache.device)[:, None]
    blocks = blocks.long()
    into = blocks if into is None else into.long()
    for start in range(0, source.shape[1], TILE):
        take = source[:, start : start + TILE]
        put = begin + start + torch.arange(take.shape[1], device=cache.device)
        rows = cache[blocks[take // block_size], heads, take % block_size]  # [h, tile, w]
        cache[into[put // block_size], heads, put % block_size] = rows
