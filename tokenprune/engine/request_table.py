"""The pruned requests of a worker, by their rows in vLLM's tables, and what follows from counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import SchedulerOutput

from tokenprune.engine.private_rows import MOVED_ROWS, MovedRow, row_checksum
from tokenprune.engine.prompts import plan_request, prompt_layout, visual_ranges
from tokenprune.engine.stats import WorkerStats
from tokenprune.engine.step import PrunedRequest
from tokenprune.errors import DivergenceError
from tokenprune.shape import EngineShape

# attribute added to SchedulerOutput: {request id: Expected} of the pruned requests in the step
EXPECTED_LENGTHS = "tokenprune"


class Expected(NamedTuple):
    """What scheduler and worker must both find of a pruned request in a step.

    Attributes:
        num_computed: Tokens computed after the step.
        lengths: Physical lengths per stage then.
        num_blocks: Blocks per KV cache group during the step.
        moved: Checksum of the rows that have moved since its last step, None where none has.
    """

    num_computed: int
    lengths: tuple[int, ...]
    num_blocks: tuple[int, ...]
    moved: int | None = None


class StepNeeds(NamedTuple):
    """What the pruned requests of a step need.

    Attributes:
        drops_rows: Later stages have fewer rows.
        no_graph: Code of ours runs between layers, which no CUDA graph may skip.
    """

    drops_rows: bool = False
    no_graph: bool = False


class RequestTable:
    """Pruned requests by row, and how far their cache indices lie from positions.

    Attributes:
        requests: `[R]` the pruned requests; None for a row that is free or not pruned.
        is_pruned: `[R]` bool.
        index_offset: `[stages, R]` int32, position minus cache index in a step without pruning.
        index_offset_on_device: The same on the device.

    Args:
        shape: The engine's shape.
        max_num_reqs: `R`, requests of the engine.
        device: The worker's device.
        stats: Where freed blocks are counted.
    """

    def __init__(
        self, shape: EngineShape, max_num_reqs: int, device: torch.device, stats: WorkerStats
    ) -> None:
        self._stats = stats
        self._device = device
        self.requests: list[PrunedRequest | None] = [None] * max_num_reqs
        # what became of rows that moved: blocks per group, until the request runs again
        self._moved: dict[int, MovedRow] = {}
        self.is_pruned = np.zeros(max_num_reqs, dtype=bool)
        self.index_offset = np.zeros((shape.num_stages, max_num_reqs), dtype=np.int32)
        self.index_offset_on_device: Tensor = torch.from_numpy(self.index_offset.copy()).to(device)

    def add(self, output: SchedulerOutput, rows: dict[str, int], shape: EngineShape) -> None:
        """Take over the new requests of a step; the scheduler says which of them are pruned.

        Args:
            output: The step.
            rows: Rows by request id.
            shape: The engine's shape.

        Raises:
            DivergenceError: The scheduler prunes a request that we would not.
        """
        expected = getattr(output, EXPECTED_LENGTHS, {})
        for new in output.scheduled_new_reqs:
            if new.req_id not in expected:
                continue
            layout = prompt_layout(new.prompt_len, visual_ranges(new.mm_features))
            plan = plan_request(new.sampling_params, layout, shape)
            if not plan.is_pruned:
                raise DivergenceError(f"the worker would not prune request {new.req_id}")
            request = PrunedRequest(new.req_id, layout, plan)
            row = rows[new.req_id]
            self.requests[row] = request
            self.is_pruned[row] = True
            if plan.visual is not None:
                self.index_offset[:, row] = request.index_offset(layout.num_tokens)
            self._send(row)

    def remove(self, row: int) -> bool:
        """Forget the request of a row; return whether there was one."""
        if not self.is_pruned[row]:
            return False
        self.requests[row] = None
        self._moved.pop(row, None)
        self.is_pruned[row] = False
        self.index_offset[:, row] = 0
        self.index_offset_on_device[:, row] = 0
        return True

    def moved_rows(self, output: SchedulerOutput, rows: dict[str, int]) -> dict[int, MovedRow]:
        """Return the rows that move in a step, by row; they are checked when it runs again."""
        moved = getattr(output, MOVED_ROWS, {})
        found = {rows[request_id]: blocks for request_id, blocks in moved.items()}
        self._moved |= found
        return found

    def _send(self, row: int) -> None:
        offsets = torch.from_numpy(self.index_offset[:, row]).to(self._device)
        self.index_offset_on_device[:, row] = offsets

    def drop_emptied_blocks(
        self,
        output: SchedulerOutput,
        rows: dict[str, int],
        block_tables: Any,
        groups: Sequence[Sequence[int]],
    ) -> None:
        """Cut the block tables of running requests to what they hold, as the scheduler did.

        Args:
            output: The step to come.
            rows: Rows by request id.
            block_tables: vLLM's block tables.
            groups: Per stage its KV cache groups.
        """
        num_blocks = block_tables.num_blocks.np
        cached = output.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            row = rows[request_id]
            request = self.requests[row]
            if request is None or not request.lengths.frees_blocks:
                continue
            freed = 0
            moved = self._moved.get(row)
            for stage, held in enumerate(request.lengths.all_stages(computed)):
                for group in groups[stage]:
                    needed = -(-held // block_tables.block_sizes[group])
                    if moved is not None and (blocks := moved[group]) is not None:
                        del blocks[needed:]
                    freed += max(0, int(num_blocks[group, row]) - needed)
                    num_blocks[group, row] = min(num_blocks[group, row], needed)
            if freed:
                self._stats.count_freed(request.freeing_method, freed)

    def update(
        self,
        output: SchedulerOutput,
        rows: dict[str, int],
        num_computed: np.ndarray,
        block_tables: Any,
    ) -> StepNeeds:
        """Move the offsets of a step's requests, checking that the scheduler counts as we do.

        Args:
            output: The step.
            rows: Rows by request id.
            num_computed: `[R]` tokens computed before the step.
            block_tables: vLLM's block tables.

        Raises:
            DivergenceError: Lengths or blocks differ; going on would corrupt the cache.
        """
        drops_rows = no_graph = moved = False
        for request_id, expected in getattr(output, EXPECTED_LENGTHS, {}).items():
            row = rows[request_id]
            before = int(num_computed[row])
            after = before + output.num_scheduled_tokens[request_id]
            request = self.requests[row]
            found = None
            if request is not None:
                blocks = tuple(block_tables.num_blocks.np[:, row].tolist())
                to_check = self._moved.pop(row, None)
                checksum = None if to_check is None else row_checksum(to_check)
                found = Expected(after, request.lengths.all_stages(after), blocks, checksum)
            if request is None or found != expected:
                raise DivergenceError(
                    f"request {request_id}: the scheduler counts {expected}, the worker {found}"
                )
            no_graph |= request.needs_no_graph(before, after)
            if request.drops_rows(before):
                drops_rows = True
            elif request.lengths.frees_blocks:
                offset = request.index_offset(before)
                if (self.index_offset[:, row] != offset).any():
                    self.index_offset[:, row] = offset
                    moved = True
        if moved:
            async_tensor_h2d(self.index_offset, out=self.index_offset_on_device)
        return StepNeeds(drops_rows, no_graph or drops_rows)

    def kv_bytes_saved(self, num_computed: np.ndarray, block_tables: Any, groups: Any) -> int:
        """Return the bytes of KV blocks that live pruned requests do without, from block tables.

        Args:
            num_computed: `[R]` tokens computed.
            block_tables: vLLM's block tables.
            groups: vLLM's KV cache groups.
        """
        saved = 0
        for row in np.flatnonzero(self.is_pruned):
            computed = int(num_computed[row])
            request = self.requests[row]
            if request is not None and request.waits(computed):
                # blocks that come once the prompt is complete are not saved
                continue
            for group, config in enumerate(groups):
                spec = config.kv_cache_spec
                held = int(block_tables.num_blocks.np[group, row])
                unpruned = -(-computed // spec.block_size)
                saved += max(0, unpruned - held) * spec.page_size_bytes * len(config.layer_names)
        return saved
