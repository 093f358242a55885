"""Slot mappings and batches per stage, by physical length."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.input_batch import InputBatch

from tokenprune.engine.model_state import StagedStep
from tokenprune.engine.request_table import RequestTable
from tokenprune.engine.step import PrunedStep, StageRows


class SlotBuilder:
    """Makes the slot mappings of a step that holds pruned requests.

    Args:
        block_tables: vLLM's block tables.
        groups: Per stage its KV cache groups.
        device: The worker's device.
    """

    def __init__(
        self, block_tables: Any, groups: Sequence[Sequence[int]], device: torch.device
    ) -> None:
        self._block_tables = block_tables
        self._groups = groups
        self._device = device
        self._slots_of_stage = torch.empty_like(block_tables.slot_mappings)

    def shifted(
        self, batch: InputBatch, table: RequestTable, own_rows: np.ndarray | None
    ) -> tuple[StagedStep, Tensor]:
        """All stages have the same rows; only cache indices differ from positions.

        Args:
            batch: vLLM's batch.
            table: Offsets of the requests.
            own_rows: `[stages, num_reqs]` limit of what vLLM's attention reads, or None.

        Returns:
            The batch of each stage, and vLLM's slot mappings of all groups.
        """
        offset_np = table.index_offset[:, batch.idx_mapping_np]
        offset = table.index_offset_on_device[:, batch.idx_mapping]
        num_reqs, num_tokens = batch.num_reqs, batch.num_tokens
        of_token = offset
        if num_tokens != num_reqs:
            counts = torch.from_numpy(batch.num_scheduled_tokens).to(self._device)
            of_token = offset.repeat_interleave(counts, dim=1, output_size=num_tokens)
        batches = []
        for stage in range(len(self._groups)):
            indices = batch.positions[:num_tokens] - of_token[stage]
            self._fill(stage, batch, batch.query_start_loc, indices)
            seq_lens = batch.seq_lens.clone()
            seq_lens[:num_reqs] -= offset[stage]
            upper = batch.seq_lens_cpu_upper_bound.clone()
            upper[:num_reqs] -= torch.from_numpy(offset_np[stage])
            if own_rows is not None:
                # what vLLM makes of a row with packed blocks is overwritten
                upper[:num_reqs].clamp_(max=torch.from_numpy(own_rows[stage]))
                limit = async_tensor_h2d(own_rows[stage], device=self._device)
                seq_lens[:num_reqs].clamp_(max=limit)
            batches.append(
                dataclasses.replace(batch, seq_lens=seq_lens, seq_lens_cpu_upper_bound=upper)
            )
        slots = self._block_tables.slot_mappings[:, : batch.num_tokens_after_padding]
        return StagedStep(batch, batches), slots

    def staged(self, batch: InputBatch, step: PrunedStep) -> tuple[StagedStep, list[Tensor]]:
        """Later stages have fewer rows.

        Args:
            batch: vLLM's batch.
            step: The step, with the rows of each stage.

        Returns:
            The batch of each stage, and the slots of each group, `[rows of its stage]`.
        """
        stages = step.stages or ()
        slots: list[Tensor] = [batch.positions] * sum(len(groups) for groups in self._groups)
        batches = []
        for stage, rows in enumerate(stages):
            stage_batch = self._stage_batch(batch, rows)
            # a prompt that waited may bring more rows than a step has tokens
            of_groups = torch.empty(
                (len(slots), rows.num_rows), dtype=torch.int64, device=self._device
            )
            self._compute(
                batch,
                stage_batch.query_start_loc,
                torch.from_numpy(rows.cache_indices()).to(self._device),
                of_groups,
            )
            if len(rows.idle):
                of_groups[:, torch.from_numpy(rows.idle.astype(np.int64))] = PAD_SLOT_ID
            for group in self._groups[stage]:
                slots[group] = of_groups[group]
            batches.append(stage_batch)
        return StagedStep(batch, batches), slots

    def _stage_batch(self, batch: InputBatch, rows: StageRows) -> InputBatch:
        starts = rows.starts
        seq_lens = torch.from_numpy(rows.seq_lens)
        return dataclasses.replace(
            batch,
            num_scheduled_tokens=rows.counts,
            num_tokens=rows.num_rows,
            num_tokens_after_padding=rows.num_rows,
            query_start_loc=torch.from_numpy(starts).to(self._device),
            query_start_loc_np=starts,
            seq_lens=seq_lens.to(self._device),
            seq_lens_cpu_upper_bound=seq_lens,
        )

    def _fill(
        self, stage: int, batch: InputBatch, query_start_loc: Tensor, indices: Tensor
    ) -> None:
        # vLLM's kernel serves all groups at once; this stage's rows of its result are kept
        self._compute(batch, query_start_loc, indices, self._slots_of_stage)
        for group in self._groups[stage]:
            self._block_tables.slot_mappings[group].copy_(self._slots_of_stage[group])

    def _compute(
        self, batch: InputBatch, query_start_loc: Tensor, indices: Tensor, out: Tensor
    ) -> None:
        self._block_tables.compute_slot_mappings(
            batch.idx_mapping, query_start_loc, indices, num_tokens_padded=out.shape[1], out=out
        )
