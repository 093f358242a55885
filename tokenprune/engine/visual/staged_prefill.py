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
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context

from tokenprune.engine.families.base import Decoder, DecoderLayer
from tokenprune.engine.guard import PolicyGuard
from tokenprune.engine.kv.cache_layers import CacheLayer
from tokenprune.engine.stats import WorkerStats
from tokenprune.engine.step import PrunedStep
from tokenprune.engine.visual.image_scores import ImageScorer
from tokenprune.engine.visual.image_selection import ImageSelection
from tokenprune.engine.visual.prompt_selection import PromptSelection
from tokenprune.engine.visual.pruning_step import PruningStep
from tokenprune.engine.visual.query_key_probe import QueryKeyProbe
from tokenprune.engine.visual.step_rows import HIDDEN, POSITIONS
from tokenprune.engine.visual.waiting_rows import RowPool, WaitingPrompts
from tokenprune.figures import Op
from tokenprune.policies import AfterPrompt, KnownRows, PerImage
from tokenprune.shape import EngineShape


class StagedPrefill:
    """The hooks on one model, and the step they act in.

    Args:
        model: The model.
        decoder: Its decoder.
        shape: The engine's shape.
        pool: Where rows wait for their prompt.
        device: The worker's device.
        stats: Where operations are timed.
        scorer: Scores images, or None where the vision tower cannot be read.

    Attributes:
        caches: By vLLM's attention layer its KV cache, where that can be read.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        shape: EngineShape,
        pool: RowPool,
        device: torch.device,
        stats: WorkerStats,
        scorer: ImageScorer | None = None,
    ) -> None:
        self._scorer = scorer
        self._shape = shape
        self._device = device
        self._stats = stats
        self._guard = PolicyGuard(stats)
        self._waiting = WaitingPrompts(pool)
        self.caches: Mapping[Any, CacheLayer] = {}
        self._step: PruningStep | None = None
        self._probe = QueryKeyProbe(list(decoder.layers))
        model.register_forward_pre_hook(self._skip_compiled)
        for index, layer in enumerate(decoder.layers):
            layer.module.register_forward_pre_hook(
                self._before_layer(index, layer), with_kwargs=True
            )
            for part in (layer.attention, layer.mlp):
                part.register_forward_hook(self._after_part(index), with_kwargs=True)
            if index < shape.num_late:
                layer.module.register_forward_hook(self._before_late_rows)
        decoder.norm.register_forward_pre_hook(self._before_norm)

    def begin_step(self, step: PrunedStep) -> None:
        """Make the hooks act in the coming forward pass, if it drops rows."""
        if step.stages is None:
            return
        pruning = PruningStep(
            step,
            self._shape.max_num_batched_tokens,
            self._waiting.pool,
            self._probe,
            self._cached_keys,
            self._device,
            self._stats,
        )
        for place, request, before, after in step.pruned():
            if not request.drops_rows(before):
                continue
            chunk = range(before, after)
            match request.plan.visual:
                case KnownRows() as plan:
                    pruning.add_known(place, plan, chunk)
                case PerImage() as plan:
                    assert self._scorer is not None, "images are not planned without a scorer"
                    pruning.images.append(
                        ImageSelection.of(
                            place, plan, request.request_id, chunk, self._scorer, self._guard
                        )
                    )
                case AfterPrompt() as plan:
                    first_waiting = request.lengths.first_waiting
                    if first_waiting is None or after <= plan.first:
                        continue
                    pruning.prompts[place] = PromptSelection.of(
                        place,
                        plan,
                        first_waiting,
                        chunk,
                        self._waiting.of(int(step.indices[place])),
                        self._shape,
                        self._device,
                        self._guard,
                    )
        self._step = pruning

    def after_forward(self, step: PrunedStep) -> None:
        """Count the prompts that are complete, and give back what they had waiting."""
        for place, request, before, after in step.pruned():
            visual = request.plan.visual
            if visual is not None and request.ends_prompt(before, after):
                self.forget(int(step.indices[place]))
                self._stats.count_visual(
                    visual.policy.name, request.layout.num_visual, visual.kept[-1]
                )

    def end_step(self) -> None:
        """Make the hooks return at once again."""
        self._step = None

    def forget(self, index: int) -> None:
        """Give back what a request has waiting, by its row in vLLM's tables."""
        self._waiting.forget(index)

    def score_images(self) -> None:
        """Score the images of the coming forward pass; called before vLLM encodes any."""
        if self._step is not None and self._scorer is not None:
            for selection in self._step.images:
                selection.score(self._scorer)

    def _cached_keys(self, core: Any, index: int, count: int) -> Tensor:
        layer = self.caches[core]
        key, _ = layer.layout.read(layer.cache, layer.blocks[index], 0, count)
        return key

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
            if step.rows.rows is not None and index <= self._shape.num_late:
                inputs = step.after_late_rows(index - 1, inputs)
            if step.rows.positions is not None:
                inputs[POSITIONS] = step.rows.positions
            if stage is not None:
                inputs = step.enter(stage, layer, inputs)
            return tuple(inputs.pop(name) for name in names[: len(args)]), inputs

        return hook

    def _after_part(self, index: int) -> Any:
        def hook(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            step = self._step
            if torch.compiler.is_compiling() or step is None or self._probe.is_running:
                return
            step.observe(index, kwargs[HIDDEN] if HIDDEN in kwargs else args[0], output)

        return hook

    def _before_norm(self, norm: nn.Module, args: Any) -> Any:
        return self._scattered(args)

    def _before_late_rows(self, layer: nn.Module, args: Any, output: Any) -> Any:
        return self._scattered(output)

    def _scattered(self, tensors: Any) -> Any:
        step = self._step
        if torch.compiler.is_compiling() or step is None or step.rows.rows is None:
            return None
        with self._stats.time(Op.SCATTER):
            return step.rows.scatter(tensors)
