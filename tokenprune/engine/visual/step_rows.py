"""The rows of one pruning step on their way through the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenprune.engine.step import StageRows

# the arguments of a layer that have a row per token: of positions it is the last dimension, of the
# others the first
POSITIONS, HIDDEN, RESIDUAL = "positions", "hidden_states", "residual"


class StepRows:
    """Which rows are there, and where they belong among those of the whole step.

    Rows that waited for their prompt have no place in the step. They are appended to it, and what
    becomes of them is not scattered back.

    Args:
        full_starts: `[num_reqs + 1]` where each request's tokens begin.
        stages: Rows of each stage.

    Attributes:
        stages: Rows of each stage.
        stage: The stage at work.
        rows: Rows of that stage as indices into the step's rows, appended ones after the others;
            None while all of the step are there and no others.
        positions: Their positions.
        num_full: Rows of the step.
        num_appended: Rows appended so far.
    """

    def __init__(self, full_starts: np.ndarray, stages: Sequence[StageRows]) -> None:
        self._full_starts = full_starts
        self.stages = stages
        self.stage = 0
        self.rows: Tensor | None = None
        self.positions: Tensor | None = None
        self.num_full = int(full_starts[-1])
        self.num_appended = 0
        # appended rows between a scatter and the gather after it
        self._without_place: dict[str, Tensor] = {}

    def starts(self, stage: int) -> np.ndarray:
        """Return where each request's rows begin at `stage`; before the first: its tokens."""
        return self._full_starts if stage < 0 else self.stages[stage].starts

    def append(
        self, inputs: Mapping[str, Any], summed: Tensor, positions: Tensor
    ) -> dict[str, Any]:
        """Return a layer's inputs with rows that were not in the step.

        Args:
            inputs: Arguments of its forward by name.
            summed: `[n, C]` sum of hidden state and residual of each.
            positions: `[n]` or `[3, n]`.
        """
        hidden = inputs[HIDDEN]
        others = [
            name
            for name, value in inputs.items()
            if name not in (POSITIONS, HIDDEN, RESIDUAL) and _has_rows(value, len(hidden))
        ]
        assert not others, f"rows of {', '.join(others)} do not wait"
        appended = dict(inputs)
        # norms add the residual first, so it may hold the whole sum
        if inputs.get(RESIDUAL) is None:
            appended[HIDDEN] = torch.cat([hidden, summed])
        else:
            appended[HIDDEN] = torch.cat([hidden, torch.zeros_like(summed)])
            appended[RESIDUAL] = torch.cat([inputs[RESIDUAL], summed])
        appended[POSITIONS] = torch.cat([inputs[POSITIONS], positions], dim=-1)
        if self.rows is None:
            self.rows = torch.arange(self.num_full, device=hidden.device)
        first = self.num_full + self.num_appended
        self.num_appended += len(summed)
        places = torch.arange(first, first + len(summed), device=hidden.device)
        self.rows = torch.cat([self.rows, places])
        return appended

    def keep(self, inputs: Mapping[str, Any], kept: Tensor) -> dict[str, Any]:
        """Return a layer's inputs with the rows that are kept."""
        inputs = gathered(inputs, kept)
        self.rows = kept if self.rows is None else self.rows[kept]
        self.positions = inputs[POSITIONS]
        return inputs

    def scatter(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Put rows back in their places among all rows of the step.

        Dropped rows are zero; nothing reads them, and nothing samples from them.

        Args:
            tensors: `[rows, C]` hidden states, and residuals where there are any.
        """
        assert self.rows is not None
        whole = [
            x.new_zeros((self.num_full + self.num_appended, x.shape[-1])).index_copy_(
                0, self.rows, x
            )
            for x in tensors
        ]
        names = (HIDDEN, RESIDUAL)
        self._without_place = {
            name: x[self.num_full :] for name, x in zip(names, whole, strict=False)
        }
        return tuple(x[: self.num_full] for x in whole)

    def gather_again(self, inputs: Mapping[str, Any], late: Tensor | None) -> dict[str, Any]:
        """Return a layer's inputs with the stage's rows, after the model added to them.

        Args:
            inputs: Arguments of its forward by name, with all rows of the step.
            late: `[num_appended, C]` what the model would have added to appended rows.
        """
        assert self.rows is not None
        inputs = dict(inputs)
        for name, rows in self._without_place.items():
            if name == HIDDEN and late is not None:
                rows = rows + late
            inputs[name] = torch.cat([inputs[name], rows])[self.rows]
        inputs[POSITIONS] = self.positions
        return inputs


def gathered(inputs: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """Return a layer's inputs with some of the rows of every tensor that has a row per token."""
    num_rows = len(inputs[HIDDEN])
    kept = {POSITIONS: inputs[POSITIONS][..., rows]}
    for name, value in inputs.items():
        if name != POSITIONS and _has_rows(value, num_rows):
            kept[name] = value[rows]
    return {**inputs, **kept}


def _has_rows(value: Any, num_rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == num_rows
