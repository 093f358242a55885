"""Rows that leave the prefix cache, on the side of the worker.

The step that first rewrites a row of a stage finds it in blocks that others may read. What stays
is written to the blocks that the scheduler names, and the block table follows on the same stream
once all layers of its group are done; the step itself has attended to the old ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from tokenprune.engine.private_rows import MovedRow


class MovedRows:
    """The rows that move in one step.

    Args:
        block_tables: vLLM's block tables.
        device: The worker's device.
    """

    def __init__(self, block_tables: Any, device: torch.device) -> None:
        self._tables = [table.gpu for table in block_tables.block_tables]
        self._device = device
        self._rows: dict[tuple[int, int], Tensor] = {}

    def begin_step(self, rows: Mapping[int, MovedRow]) -> None:
        """Send the blocks of a step's moving rows to the device, in one piece.

        Args:
            rows: Per row in vLLM's tables, the block ids of each group.
        """
        self._rows = {}
        ids = {
            (index, group): row
            for index, moved in rows.items()
            for group, row in enumerate(moved)
            if row is not None
        }
        if not ids:
            return
        flat = np.concatenate([np.asarray(row, dtype=np.int32) for row in ids.values()])
        parts = async_tensor_h2d(flat, device=self._device).split([len(r) for r in ids.values()])
        self._rows = dict(zip(ids, parts, strict=True))

    def of(self, index: int, group: int) -> Tensor | None:
        """Return the blocks that a row moves to, `[num_blocks]` int32; None: it stays in place."""
        return self._rows.get((index, group))

    def settle(self, index: int, groups: Collection[int]) -> None:
        """Put the rows of a request that were written in their place, in the block tables."""
        for group in groups:
            row = self._rows.pop((index, group), None)
            if row is not None:
                self._tables[group][index, : len(row)] = row
