"""A step that drops visual rows: which rows enter each stage, and who chooses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenprune.engine.families.base import DecoderLayer
from tokenprune.engine.stats import WorkerStats
from tokenprune.engine.step import PrunedStep, known_rows
from tokenprune.engine.visual.image_selection import ImageSelection
from tokenprune.engine.visual.prompt_selection import PromptSelection
from tokenprune.engine.visual.query_key_probe import QueryKeyProbe
from tokenprune.engine.visual.step_rows import HIDDEN, POSITIONS, RESIDUAL, StepRows, gathered
from tokenprune.engine.visual.waiting_rows import RowPool
from tokenprune.figures import Op
from tokenprune.policies import KnownRows


class PruningStep:
    """The requests of a step that drop rows.

    Args:
        step: The step.
        max_rows: Rows that are scored at once.
        pool: Where rows wait for their prompt.
        probe: Reads queries and keys of rows.
        cached_keys: Reads the first `n` keys of a request, by its row in vLLM's tables, in the
            cache of an attention layer, `[H, n, D]`.
        device: The worker's device.
        stats: Where operations are timed.

    Attributes:
        rows: The rows that are there.
        images: Requests whose images are chosen from one by one.
        prompts: Per place in the batch, those that choose from the whole prompt.
    """

    def __init__(
        self,
        step: PrunedStep,
        max_rows: int,
        pool: RowPool,
        probe: QueryKeyProbe,
        cached_keys: Callable[[Any, int, int], Tensor],
        device: torch.device,
        stats: WorkerStats,
    ) -> None:
        assert step.stages is not None
        self.rows = StepRows(step.full_starts, step.stages)
        self.images: list[ImageSelection] = []
        self.prompts: dict[int, PromptSelection] = {}
        self._max_rows = max_rows
        self._pool = pool
        self._probe = probe
        self._cached_keys = cached_keys
        self._indices = step.indices
        self._device = device
        self._stats = stats
        # per request whose rows are known before the first layer, its rows at each stage
        self._known: dict[int, list[Tensor]] = {}
        # whose rows were appended to the step, in order, and how many
        self._appended: list[tuple[PromptSelection, int]] = []

    def add_known(self, place: int, plan: KnownRows, chunk: range) -> None:
        """Take a request whose rows follow from its prompt alone."""
        self._known[place] = [
            torch.from_numpy(rows.astype(np.int64)).to(self._device)
            for rows in known_rows(plan, chunk.start, len(chunk))
        ]

    def enter(self, stage: int, layer: DecoderLayer, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of a stage's first layer with the rows that enter the stage."""
        merged = self._choose_images(inputs[HIDDEN]) if stage == 0 else []
        waiting = [s for s in self.prompts.values() if s.first_waiting == stage]
        if waiting or self.rows.stages[stage].num_rows != len(inputs[HIDDEN]):
            inputs, moved = self._wait_or_go_on(stage, waiting, inputs)
            kept = self._kept(stage, layer, inputs, moved)
            with self._stats.time(Op.GATHER):
                inputs = self.rows.keep(inputs, kept)
                for places, features in merged:
                    inputs[HIDDEN][places] = features
        self.rows.stage = stage
        return inputs

    def observe(self, layer: int, x_in: Tensor, x_out: Tensor) -> None:
        """Show a sub-module's input and output, `[rows, C]` each, to those who score it."""
        starts = self.rows.starts(self.rows.stage)
        for selection in self.prompts.values():
            if layer not in selection.observed or selection.is_aside:
                continue
            begin = int(starts[selection.index]) + selection.num_before
            rows = slice(begin, begin + selection.num_prompt_rows)
            with self._stats.time(Op.OBSERVE):
                selection.observe(x_in[rows], x_out[rows])

    def after_late_rows(self, layer: int, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the stage's rows once the model added features to those of the step.

        Args:
            layer: After which it did.
            inputs: Arguments of the next one, with all rows of the step.
        """
        hidden = inputs[HIDDEN]
        starts = self.rows.starts(-1)
        for selection in self.prompts.values():
            if selection.is_aside:
                # rows that wait are zero in the step, so what is there now was added
                begin = int(starts[selection.index]) + selection.num_before
                rows = hidden[begin : int(starts[selection.index + 1])]
                selection.waiting.late[layer] += self._pool.store(rows)
        late = [
            self._pool.read(selection.waiting.late[layer])
            if selection.is_complete
            else hidden.new_zeros((count, hidden.shape[1]))
            for selection, count in self._appended
        ]
        return self.rows.gather_again(inputs, torch.cat(late) if late else None)

    def _wait_or_go_on(
        self, stage: int, selections: list[PromptSelection], inputs: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[int, Tensor]]:
        """Put rows of prompts aside that are not complete, and append those of prompts that are.

        Of the former one row is appended, which stands in for all of them where no other goes on.

        Returns:
            The inputs with appended rows, and per place the rows of its request among them.
        """
        starts = self.rows.starts(stage - 1)
        end = len(inputs[HIDDEN])
        appended, positions, moved = [], [], {}
        for selection in selections:
            begin, stop = int(starts[selection.index]), int(starts[selection.index + 1])
            here = torch.arange(begin, stop, device=self._device)
            before, here = here[: selection.num_before], here[selection.num_before :]
            if selection.ends_prompt:
                rows = self._pool.read(selection.waiting.rows)
                positions += selection.waiting.positions
                selection.take_up()
            else:
                rows, at = _summed(inputs, here), inputs[POSITIONS][..., here]
                selection.put_aside(self._pool.store(rows), at)
                stand_in = slice(0 if len(before) else 1)
                rows, here = rows[stand_in], here[:0]
                positions.append(at[..., stand_in])
            appended.append(rows)
            self._appended.append((selection, len(rows)))
            there = torch.arange(end, end + len(rows), device=self._device)
            moved[selection.index] = torch.cat([before, there, here])
            end += len(rows)
        if end > len(inputs[HIDDEN]):
            inputs = self.rows.append(inputs, torch.cat(appended), torch.cat(positions, dim=-1))
        return inputs, moved

    def _kept(
        self, stage: int, layer: DecoderLayer, inputs: Mapping[str, Any], moved: dict[int, Tensor]
    ) -> Tensor:
        """Return which rows enter a stage, as indices into its first layer's inputs."""
        starts = self.rows.starts(stage - 1)
        parts: list[Tensor] = []
        for place, count in enumerate(self.rows.stages[stage].counts):
            rows = moved.get(place)
            if rows is None:
                rows = torch.arange(int(starts[place]), int(starts[place + 1]), device=self._device)
            dropped = len(rows) - int(count)
            if dropped == 0:
                parts.append(rows)
            elif place in self._known:
                known = self._known[place]
                kept = torch.searchsorted(known[stage - 1], known[stage]) if stage else known[0]
                parts.append(rows[kept])
            else:
                selection = self.prompts[place]
                parts.append(rows[self._choose(selection, dropped, layer, inputs, rows)])
        return torch.cat(parts)

    def _choose(
        self,
        selection: PromptSelection,
        dropped: int,
        layer: DecoderLayer,
        inputs: Mapping[str, Any],
        rows: Tensor,
    ) -> Tensor:
        def attention() -> Tensor:
            queries, keys = [], []
            if selection.num_cached:
                index = int(self._indices[selection.index])
                keys.append(self._cached_keys(layer.core, index, selection.num_cached))
            num_rows = selection.num_before + selection.num_prompt_rows
            for part in torch.split(rows[:num_rows], self._max_rows):
                # gathered, so the layer may overwrite them
                query, key = self._probe.read(layer, gathered(inputs, part))
                queries.append(query)
                keys.append(key)
            text = selection.plan.prompt.num_text_after
            query = torch.cat(queries, dim=1)[:, -text:]
            key = torch.cat([k.to(query.dtype) for k in keys], dim=1)
            with self._stats.time(Op.INSTRUCTION_ATTENTION):
                return selection.attention_of_text(query, key, float(layer.core.impl.scale))

        with self._stats.time(Op.SELECT):
            return selection.choose(dropped, attention)

    def _choose_images(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Choose from the images of the step; return what becomes of which rows at stage 0."""
        merged = []
        for selection in self.images:
            begin = int(self.rows.starts(-1)[selection.index])
            with self._stats.time(Op.SELECT):
                rows, replaced = selection.choose(
                    hidden[begin : begin + selection.count], len(self.rows.stages)
                )
            self._known[selection.index] = rows
            first = int(self.rows.starts(0)[selection.index])
            merged += [(first + places, features) for places, features in replaced]
        return merged


def _summed(inputs: Mapping[str, Any], rows: Tensor) -> Tensor:
    """Return the hidden state of rows with the residual that norms add to it, `[n, C]`."""
    hidden, residual = inputs[HIDDEN][rows], inputs.get(RESIDUAL)
    return hidden if residual is None else hidden + residual[rows]
