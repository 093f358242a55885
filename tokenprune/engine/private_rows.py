"""Rows that leave the prefix cache, on the side of the scheduler.

Until its first token is evicted or packed, a request's blocks hold what anybody's would: they are
hashed, found and read by others. The step that first rewrites a row of a stage must leave them as
they are. It moves the row: what stays goes to blocks of the request's own, the shared ones lose a
reference at the head of the next `schedule()`, and nothing of the request is hashed any more.

Whether the pool has room for that is decided while the step's blocks are allocated, since a later
request of the same step may find the very blocks that the step rewrites.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from tokenprune.plan import RequestPlan

# attribute added to SchedulerOutput: {request id: per KV cache group the block ids of the row that
# the step moves to, None where it is rewritten in place}
MOVED_ROWS = "tokenprune_moved_rows"

MovedRow = tuple[list[int] | None, ...]


def row_checksum(rows: Sequence[Sequence[int] | None]) -> int:
    """Return a CRC-32 of the block ids of a request's rows, those that are None left out."""
    crc = 0
    for ids in rows:
        if ids is not None:
            crc = zlib.crc32(array("i", ids), crc)
    return crc


class GroupRows(Protocol):
    """The rows of one KV cache group, as its manager holds them."""

    block_pool: Any
    req_to_blocks: Any
    moved_rows: dict[str, list[KVCacheBlock]]

    def num_blocks_to_move(self, request_id: str, num_tokens: int) -> int:
        """Return the blocks of the step to `num_tokens` if hashed ones are left to others."""

    def take_moved_row(self, request_id: str) -> bool:
        """Put a row in its new blocks; return whether there was one."""

    def close(self, request_id: str) -> None:
        """Hash no more of a request."""

    def free_emptied(self, request_id: str, lengths: Sequence[int]) -> None:
        """Give back the blocks that the last step emptied, of physical `lengths` per stage."""


class PrivateRows:
    """The rows of all KV cache groups that move in the step that is being scheduled.

    Args:
        managers: The managers of the groups.
        plans: Plans of the pruned requests by id; the scheduler shares its own mapping.
        num_running: Returns how many requests run.
    """

    def __init__(
        self,
        managers: Sequence[GroupRows],
        plans: Mapping[str, RequestPlan],
        num_running: Callable[[], int],
    ) -> None:
        self._managers = managers
        self._plans = plans
        self._num_running = num_running
        self._has_room: dict[str, bool] = {}
        self._checksums: dict[str, int] = {}
        # per request, tokens computed and physical lengths then
        self._lengths: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._closed: set[str] = set()

    def begin_step(self) -> None:
        """Forget what was decided for the last step."""
        self._has_room.clear()

    def has_room(self, request_id: str, num_tokens: int) -> bool:
        """Return whether a request's rows may leave hashed blocks to others in this step.

        Decided once for all groups, by the first that allocates, or it could take what the
        others count on. Running requests can each go on for a block before anyone must wait.

        Args:
            request_id: The request.
            num_tokens: Tokens computed after the step.
        """
        if request_id not in self._has_room:
            needed = sum(m.num_blocks_to_move(request_id, num_tokens) for m in self._managers)
            spare = self._num_running() * len(self._managers)
            free = self._managers[0].block_pool.get_num_free_blocks()
            self._has_room[request_id] = needed + spare <= free
        return self._has_room[request_id]

    def lengths(self, request_id: str, num_computed: int) -> tuple[int, ...]:
        """Return the physical lengths per stage; those after a step are asked for by the next."""
        known = self._lengths.get(request_id)
        if known is None or known[0] != num_computed:
            known = num_computed, self._plans[request_id].lengths.all_stages(num_computed)
            self._lengths[request_id] = known
        return known[1]

    def settle(self, request_id: str, num_computed: int) -> None:
        """Take over what the last step of a request did to its rows.

        Args:
            request_id: The request.
            num_computed: Tokens computed after that step.
        """
        lengths = self._plans[request_id].lengths
        closes = request_id not in self._closed and any(
            lengths.is_rewritten(num_computed, stage) for stage in range(lengths.num_stages)
        )
        if closes:
            self._closed.add(request_id)
        held = self.lengths(request_id, num_computed)
        rows: list[list[int] | None] = []
        for manager in self._managers:
            moved = manager.take_moved_row(request_id)
            if closes:
                manager.close(request_id)
            manager.free_emptied(request_id, held)
            row = manager.req_to_blocks[request_id] if moved else None
            rows.append(None if row is None else [block.block_id for block in row])
        if any(row is not None for row in rows):
            self._checksums[request_id] = row_checksum(rows)

    def of_step(self) -> dict[str, MovedRow]:
        """Return the rows that the step moves, by request."""
        requests = dict.fromkeys(r for m in self._managers for r in m.moved_rows)
        return {
            request_id: tuple(
                [block.block_id for block in m.moved_rows[request_id]]
                if request_id in m.moved_rows
                else None
                for m in self._managers
            )
            for request_id in requests
        }

    def take_checksum(self, request_id: str) -> int | None:
        """Return the checksum of rows that moved since the request last ran, or None."""
        return self._checksums.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """Drop what is known of a request that gives up its blocks."""
        self._checksums.pop(request_id, None)
        self._closed.discard(request_id)
        self._lengths.pop(request_id, None)
