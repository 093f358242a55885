"""Drops visual rows between decoder layers, by hooks that act in pruning steps only.

At the first layer of a stage the rows of every input of the layer are gathered to the kept ones;
later layers of the stage get the stage's positions; before the final norm the rows are scattered
back to their places, so the runner sees a full batch. The same is done wherever the model adds rows
of its own between layers.

Every hook returns at once while the model is traced for compilation and in all other steps, so
compiled and CUDA-graph execution are untouched.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context

from tokenprune.engine.families.base import Decoder, DecoderLayer
from tokenprune.engine.guard import PolicyGuard
from tokenprune.engine.stats import WorkerStats
from tokenprune.engine.step import PrunedStep, StageRows, known_rows
from tokenprune.engine.visual.image_scores import ImageScorer
from tokenprune.engine.visual.image_selection import ImageSelection
from tokenprune.engine.visual.prompt_selection import PromptSelection
from tokenprune.engine.visual.query_key_probe import QueryKeyProbe
from tokenprune.figures import Op
from tokenprune.policies import AfterPrompt, KnownRows, PerImage
from tokenprune.shape import EngineShape

# the argument of a layer whose last dimension are rows; of all others it is the first
POSITIONS = "positions"


@dataclass(slots=True)
class _PruningStep:
    """What the hooks need of a step.

    Attributes:
        full_starts: `[num_reqs + 1]` where each request's tokens begin.
        stages: Rows of each stage.
        known: Per request whose rows are known before the first layer, its rows at each stage.
        images: Requests whose images are chosen from one by one; they become `known`.
        prompts: Per request that chooses from the whole prompt, its selection.
        stage: The stage at work.
        rows: Rows of that stage as indices into the step's rows; None while all are present.
        positions: Their positions.
    """

    full_starts: np.ndarray
    stages: Sequence[StageRows]
    known: dict[int, list[Tensor]] = field(default_factory=dict)
    images: list[ImageSelection] = field(default_factory=list)
    prompts: dict[int, PromptSelection] = field(default_factory=dict)
    stage: int = 0
    rows: Tensor | None = None
    positions: Tensor | None = None

    def starts(self, stage: int) -> np.ndarray:
        """Return where each request's rows begin at `stage`; before the first: its tokens."""
        return self.full_starts if stage < 0 else self.stages[stage].starts


class StagedPrefill:
    """The hooks on one model, and the state of the step they act in.

    Args:
        model: The model.
        decoder: Its decoder.
        shape: The engine's shape.
        device: The worker's device.
        stats: Where operations are timed.
        scorer: Scores images, or None where the vision tower cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        shape: EngineShape,
        device: torch.device,
        stats: WorkerStats,
        scorer: ImageScorer | None = None,
    ) -> None:
        self._scorer = scorer
        self._shape = shape
        self._device = device
        self._stats = stats
        self._guard = PolicyGuard(stats)
        self._step: _PruningStep | None = None
        self._probe = QueryKeyProbe(list(decoder.layers))
        model.register_forward_pre_hook(self._skip_compiled)
        for index, layer in enumerate(decoder.layers):
            layer.module.register_forward_pre_hook(
                self._before_layer(index, layer), with_kwargs=True
            )
            for part in (layer.attention, layer.mlp):
                part.register_forward_hook(self._after_part(index), with_kwargs=True)
            if index < decoder.num_late:
                layer.module.register_forward_hook(self._before_late_rows)
        self._num_late = decoder.num_late
        decoder.norm.register_forward_pre_hook(self._before_norm)

    def begin_step(self, step: PrunedStep) -> None:
        """Make the hooks act in the coming forward pass, if it drops rows."""
        if step.stages is None:
            return
        pruning = _PruningStep(step.full_starts, step.stages)
        for place, request, before, after in step.pruned():
            if not request.drops_rows(before):
                continue
            chunk = range(before, after)
            match request.plan.visual:
                case KnownRows() as plan:
                    rows = known_rows(plan, before, len(chunk))
                    pruning.known[place] = [
                        torch.from_numpy(r.astype(np.int64)).to(self._device) for r in rows
                    ]
                case PerImage() as plan:
                    assert self._scorer is not None, "images are not planned without a scorer"
                    pruning.images.append(
                        ImageSelection.of(
                            place, plan, request.request_id, chunk, self._scorer, self._guard
                        )
                    )
                case AfterPrompt() as plan:
                    pruning.prompts[place] = PromptSelection.of(
                        place, plan, chunk, self._shape, self._device, self._guard
                    )
        self._step = pruning

    def after_forward(self, step: PrunedStep) -> None:
        """Count the prompts that are complete."""
        for _, request, before, after in step.pruned():
            visual = request.plan.visual
            if visual is not None and request.ends_prompt(before, after):
                self._stats.count_visual(
                    visual.policy.name, request.layout.num_visual, visual.kept[-1]
                )

    def end_step(self) -> None:
        """Make the hooks return at once again."""
        self._step = None

    def score_images(self) -> None:
        """Score the images of the coming forward pass; called before vLLM encodes any."""
        if self._step is not None and self._scorer is not None:
            for selection in self._step.images:
                selection.score(self._scorer)

    def _skip_compiled(self, module: nn.Module, args: Any) -> None:
        if self._step is not None and not torch.compiler.is_compiling():
            get_forward_context().skip_compiled = True

    def _before_layer(self, index: int, layer: DecoderLayer) -> Any:
        boundaries = self._shape.boundaries
        stage = boundaries.index(index) if index in boundaries else None
        names = list(inspect.signature(layer.module.forward).parameters)

        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            step = self._step
            if torch.compiler.is_compiling() or step is None:
                return None
            inputs = dict(zip(names, args, strict=False)) | kwargs
            if step.rows is not None and index <= self._num_late:
                # rows were put back for what the model adds to them
                inputs = _gathered(inputs, step.rows)
            if step.positions is not None:
                inputs[POSITIONS] = step.positions
            if stage is not None:
                merged = self._choose_images(inputs["hidden_states"]) if index == 0 else []
                kept = self._cut(step, stage, layer, inputs)
                if kept is not None:
                    with self._stats.time(Op.GATHER):
                        inputs = _gathered(inputs, kept)
                        for places, features in merged:
                            inputs["hidden_states"][places] = features
                        step.rows = kept if step.rows is None else step.rows[kept]
                    step.positions = inputs[POSITIONS]
                step.stage = stage
            return tuple(inputs.pop(name) for name in names[: len(args)]), inputs

        return hook

    def _after_part(self, index: int) -> Any:
        def hook(part: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            step = self._step
            if torch.compiler.is_compiling() or step is None or self._probe.is_running:
                return
            for selection in step.prompts.values():
                if index not in selection.observed:
                    continue
                x_in = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                begin = int(step.starts(step.stage)[selection.index])
                rows = slice(begin, begin + selection.num_prompt_rows)
                with self._stats.time(Op.OBSERVE):
                    selection.observe(x_in[rows], output[rows])

        return hook

    def _before_norm(self, norm: nn.Module, args: Any) -> Any:
        step = self._step
        if torch.compiler.is_compiling() or step is None or step.rows is None:
            return None
        return self._scattered(step.rows, args)

    def _before_late_rows(self, layer: nn.Module, args: Any, output: Any) -> Any:
        step = self._step
        if torch.compiler.is_compiling() or step is None or step.rows is None:
            return None
        return self._scattered(step.rows, output)

    def _scattered(self, rows: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Put rows back in their places among all rows of the step.

        Dropped rows are zero; nothing reads them, and nothing samples from them.
        """
        assert self._step is not None
        num_rows = int(self._step.full_starts[-1])
        with self._stats.time(Op.SCATTER):
            return tuple(
                x.new_zeros((num_rows, x.shape[-1])).index_copy_(0, rows, x) for x in tensors
            )

    def _choose_images(self, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Choose from the images of the step; return what becomes of which rows at stage 0."""
        step = self._step
        assert step is not None
        merged = []
        for selection in step.images:
            begin = int(step.full_starts[selection.index])
            with self._stats.time(Op.SELECT):
                rows, replaced = selection.choose(
                    hidden[begin : begin + selection.count], len(step.stages)
                )
            step.known[selection.index] = rows
            first = int(step.stages[0].starts[selection.index])
            merged += [(first + places, features) for places, features in replaced]
        return merged

    def _cut(
        self, step: _PruningStep, stage: int, layer: DecoderLayer, inputs: Mapping[str, Any]
    ) -> Tensor | None:
        """Return which rows of the previous stage survive into `stage`; None for all of them."""
        target = step.stages[stage]
        if target.num_rows == inputs["hidden_states"].shape[0]:
            return None
        starts = step.starts(stage - 1)
        parts: list[Tensor] = []
        for place, count in enumerate(target.counts):
            begin, end = int(starts[place]), int(starts[place + 1])
            if count == end - begin:
                parts.append(torch.arange(begin, end, device=self._device))
            elif place in step.known:
                rows = step.known[place]
                kept = torch.searchsorted(rows[stage - 1], rows[stage]) if stage else rows[stage]
                parts.append(kept + begin)
            else:
                selection = step.prompts[place]
                dropped = end - begin - int(count)
                parts.append(self._choose(selection, dropped, layer, inputs, begin) + begin)
        return torch.cat(parts)

    def _choose(
        self,
        selection: PromptSelection,
        dropped: int,
        layer: DecoderLayer,
        inputs: Mapping[str, Any],
        begin: int,
    ) -> Tensor:
        def attention() -> Tensor:
            rows = torch.arange(begin, begin + selection.num_prompt_rows, device=self._device)
            # gathered, so the layer may overwrite them
            query, key = self._probe.read(layer, _gathered(inputs, rows))
            with self._stats.time(Op.INSTRUCTION_ATTENTION):
                return selection.attention_of_text(query, key, float(layer.core.impl.scale))

        with self._stats.time(Op.SELECT):
            return selection.choose(dropped, attention)


def _gathered(inputs: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """Return a layer's inputs with some of the rows of every tensor that has a row per token."""
    num_rows = inputs["hidden_states"].shape[0]
    gathered = {}
    for name, value in inputs.items():
        if name == POSITIONS:
            gathered[name] = value[..., rows]
        elif isinstance(value, Tensor) and value.ndim and value.shape[0] == num_rows:
            gathered[name] = value[rows]
        else:
            gathered[name] = value
    return gathered
