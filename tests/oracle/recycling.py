"""VFlowOpt's recycling in plain Python, by the words of the paper: what tests compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence


def recycled(
    features: Sequence[Sequence[float]],
    importance: Sequence[float],
    grids: Sequence[tuple[int, int]],
    keep: int,
    cell: float,
) -> tuple[list[int], list[list[float]]]:
    """Return the kept tokens and their features.

    Args:
        features: Per token its values.
        importance: Per token; infinite for tokens that stay and fold nothing.
        grids: `(tokens, width)` of the grids that the tokens lie in, one behind the other.
        keep: Tokens to keep.
        cell: Side of a cell.
    """
    n = len(importance)
    where = [
        (number, math.floor(i // width / cell), math.floor(i % width / cell))
        for number, (tokens, width) in enumerate(grids)
        for i in range(tokens)
    ]
    order = sorted(range(n), key=lambda i: (-importance[i], i))
    stay = sum(math.isinf(x) for x in importance)
    cells: dict[tuple[int, int, int], list[int]] = {}
    # as many stay as they are as leave room for one token of every cell of the others
    for num_high in range(n, stay - 1, -1):
        cells = {}
        for i in sorted(order[num_high:]):
            cells.setdefault(where[i], []).append(i)
        if num_high + len(cells) <= keep or num_high == stay:
            break
    out = {i: list(features[i]) for i in order[:num_high]}
    for members in cells.values():
        slot = min(members, key=lambda i: (-importance[i], i))
        weights = [max(importance[i], 0) for i in members]
        if sum(weights) == 0:
            weights = [1.0] * len(members)
        columns = zip(*(features[i] for i in members), strict=True)
        out[slot] = [
            sum(w * x for w, x in zip(weights, column, strict=True)) / sum(weights)
            for column in columns
        ]
    kept = sorted(sorted(out, key=lambda i: (-importance[i], i))[:keep])
    return kept, [out[i] for i in kept]
