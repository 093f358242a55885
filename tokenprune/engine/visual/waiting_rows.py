"""What a prompt leaves between its chunks where later stages wait until it is complete.

Rows that reached the first cut lie in a pool of fixed size, which the scheduler fills no further
than there is room; see `tokenprune.engine.waiting_budget`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


class RowPool:
    """A pool of rows as wide as a hidden state.

    Args:
        num_rows: Rows of the pool.
        width: `C`, elements of a row.
        dtype: Their type.
        device: Where they lie.
    """

    def __init__(
        self, num_rows: int, width: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._rows = torch.empty((num_rows, width), dtype=dtype, device=device)
        self._free = list(range(num_rows))

    @property
    def num_rows(self) -> int:
        """Rows of the pool."""
        return len(self._rows)

    @property
    def num_free(self) -> int:
        """Rows that nobody holds."""
        return len(self._free)

    @property
    def num_bytes(self) -> int:
        """Memory of the pool."""
        return self._rows.nbytes

    def store(self, rows: Tensor) -> list[int]:
        """Keep `[n, C]` rows and return where they lie.

        Raises:
            RuntimeError: There is no room, so the scheduler counts otherwise.
        """
        first = len(self._free) - len(rows)
        if first < 0:
            raise RuntimeError(
                f"{len(rows)} rows of a prompt must wait, got room for {len(self._free)}; "
                "please report this"
            )
        places = self._free[first:]
        del self._free[first:]
        self._rows[self._index(places)] = rows
        return places

    def read(self, places: Sequence[int]) -> Tensor:
        """Return the rows `[n, C]` that lie at `places`."""
        return self._rows[self._index(places)]

    def release(self, places: Sequence[int]) -> None:
        """Give rows back; what was enqueued before still reads them."""
        self._free += places

    def _index(self, places: Sequence[int]) -> Tensor:
        return torch.tensor(places, dtype=torch.int64).to(self._rows.device, non_blocking=True)


@dataclass(slots=True)
class WaitingPrompt:
    """What earlier chunks of one prompt left.

    Attributes:
        rows: Where the sum of hidden state and residual of each of its tokens lies.
        late: By layer after which the model adds features, where those of each token lie.
        positions: Positions of the tokens, a tensor for each chunk.
        terms: Per chunk and observed sub-module, what the policy made of it.
    """

    rows: list[int] = field(default_factory=list)
    late: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    positions: list[Tensor] = field(default_factory=list)
    terms: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)


class WaitingPrompts:
    """The prompts of a worker that wait for their rest, by row of vLLM's tables.

    Args:
        pool: Where their rows lie.
    """

    def __init__(self, pool: RowPool) -> None:
        self.pool = pool
        self._prompts: dict[int, WaitingPrompt] = {}

    def of(self, index: int) -> WaitingPrompt:
        """Return what a request left, which is nothing before its first chunk."""
        return self._prompts.setdefault(index, WaitingPrompt())

    def forget(self, index: int) -> None:
        """Give back what a request holds; safe to call for one that holds nothing."""
        prompt = self._prompts.pop(index, None)
        if prompt is not None:
            for places in (prompt.rows, *prompt.late.values()):
                self.pool.release(places)
