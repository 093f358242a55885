"""recycle: keep the most important tokens and fold the others into one per cell of the grid.

    low      = the tokens not kept for themselves, grouped by cell of `cell` x `cell` tokens
    slot     = the most important low token of a cell, which stays in its place
    feature  = sum over the cell's low tokens of w_i x_i,      w_i = I_i / sum I

As many tokens are low as give exactly `keep` rows: of the tokens in descending importance the
first T stay as they are, and T is the number for which T plus the cells that hold the others is
`keep`. With fewer rows than cells, the most important representatives stay, and the other cells
are lost. Negative importances weigh nothing; a cell whose weights do not add up to a finite number
above zero is averaged evenly. A token of infinite importance (a line break of the image) is in no
cell. NaN is the lowest importance, after -inf, and weighs nothing.
Ties: the lower index is more important.

Source: VFlowOpt, arXiv 2508.05211, stage 0; code sihany077/VFlowOpt@129eeef, which fixes the
number of low tokens beforehand by the area of the grid, so that the number of rows varies with
the cells that happen to be occupied.
The choice is made by sorts and counts on the device, without waiting for it; the kernel folds
each row in a fixed order in float32, and the reference differs by rounding only. Rows that stay
as they are come out bit for bit.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenprune.kernels.ops.backend import ceil_div, choose_backend, describe
from tokenprune.kernels.ops.ranking import descending_order


def recycle(
    features: Tensor,
    importance: Tensor,
    grid_width: int | Sequence[tuple[int, int]],
    keep: int,
    cell: float,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose `keep` of an image's tokens and fold the others into them.

    Args:
        features: `[n, d]` tokens, row by row of their grid; any float dtype.
        importance: `[n]` float; infinity marks a token that stays and folds nothing.
        grid_width: Tokens of a grid row; or `(tokens, width)` of several grids that come after
            each other, as the base and the tiles of an image do. Cells never span two grids.
        keep: Rows to return, in `1..n`.
        cell: Side of a cell in tokens, above 0; need not be a whole number. Up to 1 every token
            has a cell of its own.
        backend: `torch`, `triton` (CUDA, or the interpreter), or None to choose by device.

    Returns:
        The indices of the kept tokens, ascending, int64 `[keep]`, and their features
        `[keep, d]` in the dtype of `features`.

    Raises:
        ValueError: A shape, dtype, device, count or name is not as above.
    """
    grids = [(len(features), grid_width)] if isinstance(grid_width, int) else list(grid_width)
    _check(features, importance, grids, keep, cell)
    on_torch = choose_backend(backend, features.device) == "torch"
    cells, num_cells = _cells(grids, cell, features.device)
    kept, slot, weight = _choose(importance, cells, num_cells, keep)
    if on_torch:
        return kept, _fold(features, slot, weight, keep).to(features.dtype)
    from tokenprune.kernels.ops.triton.recycle import fold

    return kept, fold(features, slot, weight, keep).to(features.dtype)


def recycle_reference(
    features: Tensor,
    importance: Tensor,
    grid_width: int | Sequence[tuple[int, int]],
    keep: int,
    cell: float,
) -> tuple[Tensor, Tensor]:
    """Compute `recycle` in torch: in float32, or in float64 for float64 inputs."""
    return recycle(features, importance, grid_width, keep, cell, backend="torch")


def _cells(
    grids: Sequence[tuple[int, int]], cell: float, device: torch.device
) -> tuple[Tensor, int]:
    """Return the cell of every token, and how many cells there can be: at most one per place."""
    # a smaller side separates tokens no further, it only leaves empty cells between them
    cell = max(cell, 1.0)
    parts, first = [], 0
    for tokens, width in grids:
        index = torch.arange(tokens, device=device)
        across = math.floor((min(width, tokens) - 1) / cell) + 1
        down = math.floor((ceil_div(tokens, width) - 1) / cell) + 1
        row, column = index // width, index % width
        at = [torch.floor(x.double() / cell).long() for x in (row, column)]
        parts.append(first + at[0] * across + at[1])
        first += across * down
    return torch.cat(parts), first


def _choose(
    importance: Tensor, cells: Tensor, num_cells: int, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return kept indices, and per token the kept row it goes to (`keep` for none) and its weight.

    Weights are relative: a row divides by the sum over its tokens.
    """
    n, device = len(importance), importance.device
    order = descending_order(importance)
    index = torch.arange(n, device=device)
    rank = torch.empty_like(order).scatter_(0, order, index)
    stays = importance == math.inf

    def per_cell(value: Tensor, start: int, reduce: str) -> Tensor:
        return torch.full((num_cells,), start, device=device).scatter_reduce_(
            0, cells, value, reduce
        )

    # a cell holds low tokens as long as T does not exceed the rank of its least important one
    last = per_cell(torch.where(stays, -1, rank), -1, "amax")
    gone = torch.zeros(n + 1, dtype=torch.int64, device=device)
    gone = gone.scatter_add_(0, last + 1, torch.ones_like(last)).cumsum(0)
    rows = torch.arange(n + 1, device=device) + num_cells - gone
    # each further T adds one row or none, so every count from the number of cells on is met
    at_most = torch.maximum((rows <= keep).sum() - 1, stays.sum())
    low = rank >= at_most
    best = per_cell(torch.where(low, rank, n), n, "amin")
    represents = low & (rank == best[cells])
    kept = torch.where(low & ~represents, rank + n, rank).argsort()[:keep].sort().values

    place = torch.full((n + 1,), keep, device=device)
    place[kept] = torch.arange(keep, device=device)
    representative = torch.cat([order, order.new_full((1,), n)])[best[cells]]
    slot = place[torch.where(low, representative, index)]
    dtype = torch.promote_types(importance.dtype, torch.float32)
    # a comparison with NaN is false
    positive = torch.where(importance > 0, importance, 0.0).to(dtype)
    weight = torch.where(low, positive, 1.0)
    return kept, slot, weight


def _fold(features: Tensor, slot: Tensor, weight: Tensor, keep: int) -> Tensor:
    dtype = torch.promote_types(features.dtype, torch.float32)
    # the row after the last takes the tokens that go nowhere
    total = weight.new_zeros(keep + 1).index_add_(0, slot, weight)[slot]
    count = weight.new_zeros(keep + 1).index_add_(0, slot, torch.ones_like(weight))[slot]
    share = torch.where((total > 0) & (total < math.inf), weight / total, 1 / count)
    out = torch.zeros(keep + 1, features.shape[1], dtype=dtype, device=features.device)
    return out.index_add_(0, slot, features.to(dtype) * share.to(dtype)[:, None])[:keep]


def _check(
    features: Tensor,
    importance: Tensor,
    grids: Sequence[tuple[int, int]],
    keep: int,
    cell: float,
) -> None:
    if features.ndim != 2 or not features.is_floating_point() or 0 in features.shape:
        raise ValueError(
            f"features must be 2-D [n, d] of a float dtype, not empty, got {describe(features)}"
        )
    n = len(features)
    if (
        importance.shape != (n,)
        or not importance.is_floating_point()
        or importance.device != features.device
    ):
        raise ValueError(
            f"importance must be float [{n}] on {features.device}, one entry per row of features, "
            f"got {describe(importance)}"
        )
    if sum(tokens for tokens, _ in grids) != n or any(t < 1 or w < 1 for t, w in grids):
        raise ValueError(f"grids must hold the {n} tokens in rows of at least one, got {grids}")
    if not 1 <= keep <= n:
        raise ValueError(f"keep must be within 1..{n}, got {keep}")
    if not 0 < cell < math.inf:
        raise ValueError(f"cell must be a number of tokens above 0, got {cell}")
