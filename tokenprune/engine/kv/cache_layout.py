"""How each attention backend lays keys and values out in its paged cache: one codec per layout.

A layer's cache is `[B, H, S, 2 * D]`: blocks of `S` slots, K and V of one token and head together.
FLASH_ATTN and TRITON_ATTN use it as it says. CPU_ATTN uses the same bytes of a block and head in
an order of its own, which depends on the instruction set it picked: K transposed for `vec` and
`vec16`, K and V interleaved in tiles for `amx`. Every order is a fixed permutation of the block's
elements, so the CPU codec asks vLLM's own write operator for it, once.
"""

from __future__ import annotations

import abc
import functools

import torch
from torch import Tensor

from tokenprune.errors import ConfigurationError
from tokenprune.kernels import lag_compact

# elements one move holds on the CPU: 16 MiB of float32
MAX_SCRATCH = 1 << 22


class CacheLayout(abc.ABC):
    """Reads and moves the rows of one request in one layer.

    `cache` is the layer's cache, `blocks` the request's block table `[num_blocks]`.

    Attributes:
        order: `[S, 2 * D]` int64, where each element of a block's rows lies in its storage; None
            where they lie in order.
    """

    order: Tensor | None = None

    def read(self, cache: Tensor, blocks: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Return keys and values `[H, end - begin, D]` of a range of cache indices."""
        heads, block_size, width = cache.shape[1:]
        first, last = begin // block_size, -(-end // block_size)
        whole = cache[blocks[first:last].long()]  # [blocks, H, S, 2 * D]
        if self.order is not None:
            whole = whole.flatten(2)[:, :, self.order.flatten()].view_as(whole)
        rows = whole.transpose(0, 1).reshape(heads, -1, width)
        key, value = rows[:, begin - first * block_size : end - first * block_size].chunk(2, dim=2)
        return key, value

    @abc.abstractmethod
    def move(
        self,
        cache: Tensor,
        blocks: Tensor,
        source: Tensor,
        begin: int,
        into: Tensor | None = None,
    ) -> None:
        """Move rows to the cache indices from `begin` on, of `blocks` or `into`; see `lag_compact`.

        Both are block tables of one request, `[num_blocks]`.
        """


class RowLayout(CacheLayout):
    """Plain rows, `[key, value]` of one token and head each."""

    def move(
        self,
        cache: Tensor,
        blocks: Tensor,
        source: Tensor,
        begin: int,
        into: Tensor | None = None,
    ) -> None:
        """Run the kernel."""
        lag_compact(cache, blocks, source, begin, into=into)


class PermutedLayout(CacheLayout):
    """Blocks whose elements lie in a fixed order.

    Args:
        order: `[S, 2 * D]` int64, where each element of a block's rows lies in its storage.
    """

    def __init__(self, order: Tensor) -> None:
        self.order: Tensor = order

    def move(
        self,
        cache: Tensor,
        blocks: Tensor,
        source: Tensor,
        begin: int,
        into: Tensor | None = None,
    ) -> None:
        """Gather and scatter a bounded number of rows at a time, in ascending order."""
        num_blocks, heads, block_size, width = cache.shape
        stored = cache.view(num_blocks, heads, -1)
        head = torch.arange(heads)[:, None, None]
        blocks = blocks.long()
        into = blocks if into is None else into.long()
        tile = max(1, MAX_SCRATCH // (heads * width))
        for start in range(0, source.shape[1], tile):
            take = source[:, start : start + tile, None]
            put = begin + start + torch.arange(take.shape[1])[None, :, None]
            # the gather is complete before the scatter begins
            rows = stored[blocks[take // block_size], head, self.order[take[..., 0] % block_size]]
            stored[into[put // block_size], head, self.order[put[..., 0] % block_size]] = rows


_ROW_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")
_CPU_BACKEND = "CPU_ATTN"
KNOWN_BACKENDS = (*_ROW_BACKENDS, _CPU_BACKEND)


def layout_of(backend: str, layer: torch.nn.Module, cache: Tensor) -> CacheLayout:
    """Return the layout of a layer's cache.

    Raises:
        ConfigurationError: The backend's layout is not known.
    """
    if backend in _ROW_BACKENDS:
        return RowLayout()
    if backend != _CPU_BACKEND:
        raise ConfigurationError(
            f"the attention backend must be one of {', '.join(KNOWN_BACKENDS)} to evict KV "
            f"tokens, got {backend}"
        )
    isa = str(layer.isa)
    return PermutedLayout(_cpu_order(isa, cache.dtype, cache.shape[2], cache.shape[3] // 2))


@functools.cache
def _cpu_order(isa: str, dtype: torch.dtype, block_size: int, head_size: int) -> Tensor:
    """Ask vLLM where it writes each element of a block, one bit of the answer at a time."""
    from vllm import _custom_ops as ops

    count = block_size * head_size
    number = torch.arange(count).view(block_size, 1, head_size)
    found = torch.zeros((2, count), dtype=torch.int64)
    for bit in range((count - 1).bit_length()):
        cache = torch.zeros((1, 1, block_size, 2 * head_size), dtype=dtype)
        key_cache, value_cache = cache.view(1, 1, 2 * block_size, head_size).chunk(2, dim=2)
        is_set = ((number >> bit) & 1).to(dtype)
        slots = torch.arange(block_size)
        ops.cpu_attn_reshape_and_cache(is_set, is_set, key_cache, value_cache, slots, isa)
        found |= (cache.view(2, count) != 0).long() << bit
    places = found.sort(dim=1)
    if not torch.equal(places.values, torch.arange(count).expand(2, count)):
        raise ConfigurationError(
            f"CPU_ATTN must store every element of a block once to evict KV tokens, got another "
            f"layout with instruction set {isa}, {dtype} and head size {head_size}"
        )
    key, value = places.indices.view(2, block_size, head_size)
    return torch.cat([key, value + count], dim=1)
