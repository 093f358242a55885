"""Drops visual rows between decoder layers, by hooks that act in pruning steps only.

At the first layer of a stage the rows of positions, hidden states and residual are gathered to
the kept ones; later layers of the stage get the stage's positions; before the final norm the
rows are scattered back to their places, so the runner sees a full batch.

Every hook returns at once while the model is traced for compilation and in all other steps, so
compiled and CUDA-graph execution are untouched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context

from tokenprune.engine.image_rows import ImagedRequest
from tokenprune.engine.importance import ImageScorer
from tokenprune.engine.stats import WorkerStats
from tokenprune.engine.step import PrunedRequest, StageRows, known_rows
from tokenprune.figures import Op
from tokenprune.kernels import instruction_attention
from tokenprune.policies import EngineShape, SelectInputs, VisualPolicy


class _QKSeen(Exception):
    def __init__(self, query: Tensor, key: Tensor) -> None:
        self.query, self.key = query, key


@dataclass(slots=True)
class _Choosing:
    """A request of the step whose policy chooses by tensors.

    Attributes:
        index: Place in the batch.
        visual: `[rows]` bool over the request's current prompt rows.
        rows_after_prompt: Rows of tokens generated before a preemption; always kept.
    """

    index: int
    request: PrunedRequest
    policy: VisualPolicy
    observed: range
    visual: Tensor
    rows_after_prompt: int
    accumulated: Tensor | None = None


@dataclass(slots=True)
class _Armed:
    full_starts: np.ndarray
    stages: list[StageRows]
    choosing: list[_Choosing]
    # per request whose rows are known before the first layer, its rows at each stage
    known: dict[int, list[Tensor]]
    imaged: list[ImagedRequest]
    stage: int = 0
    # rows of the current stage as indices into the step's rows; None while all are present
    rows: Tensor | None = None
    positions: Tensor | None = None


def decoder_of(model: Any) -> Any:
    """Return the module that owns the decoder `layers` and the final `norm`."""
    return model.get_language_model().model


class StagedPrefill:
    """The hooks on one model, and the state of the step they act in."""

    def __init__(
        self,
        model: nn.Module,
        shape: EngineShape,
        device: torch.device,
        stats: WorkerStats,
        scorer: ImageScorer | None = None,
    ) -> None:
        self._scorer = scorer
        self._shape = shape
        self._device = device
        self._stats = stats
        self._armed: _Armed | None = None
        self._capturing = False
        decoder = decoder_of(model)
        model.register_forward_pre_hook(self._skip_compiled)
        for index, layer in enumerate(decoder.layers):
            layer.register_forward_pre_hook(self._before_layer(index), with_kwargs=True)
            layer.self_attn.attn.register_forward_pre_hook(self._capture)
            for part in (layer.self_attn, layer.mlp):
                part.register_forward_hook(self._after_part(index), with_kwargs=True)
        decoder.norm.register_forward_pre_hook(self._before_norm)

    def arm(
        self,
        requests: list[PrunedRequest | None],
        computed: np.ndarray,
        scheduled: np.ndarray,
        stages: list[StageRows],
    ) -> None:
        """Make the hooks act in the coming forward pass."""
        choosing: list[_Choosing] = []
        known: dict[int, list[Tensor]] = {}
        imaged: list[ImagedRequest] = []
        for i, request in enumerate(requests):
            start, count = int(computed[i]), int(scheduled[i])
            if request is None or not request.drops_rows(start):
                continue
            visual = request.plan.visual
            policy = request.plan.pruning.policy("visual")
            assert visual is not None
            assert isinstance(policy, VisualPolicy)
            if visual.ranks is not None:
                rows = known_rows(request, start, count)
                known[i] = [torch.from_numpy(r.astype(np.int64)).to(self._device) for r in rows]
                continue
            if visual.images:
                assert self._scorer is not None, "the scheduler must not plan what we cannot do"
                imaged.append(ImagedRequest.of(i, request, start, count, self._scorer))
                continue
            assert start == 0, "the scheduler must keep this prompt whole"
            mask = np.zeros(request.layout.num_tokens, dtype=bool)
            for first, end in request.layout.visual_spans:
                mask[first:end] = True
            choosing.append(
                _Choosing(
                    index=i,
                    request=request,
                    policy=policy,
                    observed=policy.observed_layers(self._shape),
                    visual=torch.from_numpy(mask).to(self._device),
                    rows_after_prompt=count - request.layout.num_tokens,
                )
            )
        full_starts = np.concatenate([[0], np.cumsum(scheduled)])
        self._armed = _Armed(full_starts, stages, choosing, known, imaged)

    def disarm(self) -> None:
        """Make the hooks return at once again."""
        self._armed = None

    def score_images(self) -> None:
        """Score the images of the coming forward pass; called before vLLM encodes any."""
        if self._armed is not None and self._scorer is not None:
            for item in self._armed.imaged:
                item.score(self._scorer)

    def _skip_compiled(self, module: nn.Module, args: Any) -> None:
        if self._armed is not None and not torch.compiler.is_compiling():
            get_forward_context().skip_compiled = True

    def _before_layer(self, index: int) -> Any:
        boundaries = self._shape.boundaries
        stage = boundaries.index(index) if index in boundaries else None

        def hook(layer: nn.Module, args: Any, kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or self._armed is None:
                return None
            armed = self._armed
            positions, hidden, residual, *rest = args
            if armed.positions is not None:
                positions = armed.positions
            if stage is not None:
                folded = self._choose_images(hidden) if index == 0 else {}
                kept = self._cut(stage, layer, positions, hidden, residual)
                if kept is not None:
                    with self._stats.time(Op.GATHER):
                        positions = positions[..., kept]
                        hidden = hidden[kept]
                        for first, features in folded.items():
                            hidden[first : first + len(features)] = features
                        residual = residual[kept] if residual is not None else None
                        armed.rows = kept if armed.rows is None else armed.rows[kept]
                    armed.positions = positions
                armed.stage = stage
            return (positions, hidden, residual, *rest), kwargs

        return hook

    def _after_part(self, index: int) -> Any:
        def hook(part: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if torch.compiler.is_compiling() or self._armed is None or self._capturing:
                return
            for item in self._armed.choosing:
                if index not in item.observed:
                    continue
                x_in = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                rows = self._prompt_rows(item, self._armed.stage)
                with self._stats.time(Op.OBSERVE):
                    score = item.policy.observe(x_in[rows], output[rows], item.visual)
                item.accumulated = score if item.accumulated is None else item.accumulated + score

        return hook

    def _before_norm(self, norm: nn.Module, args: Any) -> Any:
        if torch.compiler.is_compiling() or self._armed is None or self._armed.rows is None:
            return None
        armed = self._armed
        full = []
        with self._stats.time(Op.SCATTER):
            for x in args:
                # dropped rows stay zero; nothing samples from them
                out = x.new_zeros((int(armed.full_starts[-1]), x.shape[-1]))
                full.append(out.index_copy_(0, armed.rows, x))
        return tuple(full)

    def _choose_images(self, hidden: Tensor) -> dict[int, Tensor]:
        """Choose from the images of the step; return what becomes of their rows at stage 0."""
        armed = self._armed
        assert armed is not None
        folded = {}
        for item in armed.imaged:
            begin = int(armed.full_starts[item.index])
            with self._stats.time(Op.SELECT):
                rows, replaced = item.choose(hidden[begin : begin + item.count], len(armed.stages))
            armed.known[item.index] = rows
            first = int(armed.stages[0].starts[item.index])
            folded.update({first + place: features for place, features in replaced.items()})
        return folded

    def _prompt_rows(self, item: _Choosing, stage: int) -> slice:
        assert self._armed is not None
        starts = self._armed.stages[stage].starts
        return slice(int(starts[item.index]), int(starts[item.index + 1]) - item.rows_after_prompt)

    def _cut(
        self, stage: int, layer: nn.Module, positions: Tensor, hidden: Tensor, residual: Any
    ) -> Tensor | None:
        """Return which rows of the previous stage survive into `stage`; None for all of them."""
        armed = self._armed
        assert armed is not None
        target = armed.stages[stage]
        if target.num_rows == hidden.shape[0]:
            return None
        starts = armed.stages[stage - 1].starts if stage else armed.full_starts
        choosing = {item.index: item for item in armed.choosing}
        parts: list[Tensor] = []
        for i, count in enumerate(target.counts):
            begin, end = int(starts[i]), int(starts[i + 1])
            if count == end - begin:
                parts.append(torch.arange(begin, end, device=self._device))
            elif i in armed.known:
                rows = armed.known[i]
                kept = torch.searchsorted(rows[stage - 1], rows[stage]) if stage else rows[stage]
                parts.append(kept + begin)
            else:
                item = choosing[i]
                dropped = end - begin - int(count)
                local = self._choose(item, dropped, layer, positions, hidden, residual, begin, end)
                parts.append(local + begin)
        return torch.cat(parts)

    def _choose(
        self,
        item: _Choosing,
        dropped: int,
        layer: nn.Module,
        positions: Tensor,
        hidden: Tensor,
        residual: Tensor | None,
        begin: int,
        end: int,
    ) -> Tensor:
        rows = slice(begin, end - item.rows_after_prompt)
        num_visual = self._num_visual(item)

        def attention() -> Tensor:
            return self._instruction_attention(
                layer,
                positions[..., rows],
                hidden[rows],
                residual[rows] if residual is not None else None,
                item,
            )

        with self._stats.time(Op.SELECT):
            kept = item.policy.select(
                SelectInputs(num_visual - dropped, num_visual, item.accumulated, attention)
            )
        visual_rows = item.visual.nonzero().squeeze(1)
        alive = ~item.visual
        alive[visual_rows[kept]] = True
        if item.accumulated is not None:
            item.accumulated = item.accumulated[kept]
        item.visual = item.visual[alive]
        survivors = alive.nonzero().squeeze(1)
        if item.rows_after_prompt:
            tail = torch.arange(len(alive), end - begin, device=self._device)
            survivors = torch.cat([survivors, tail])
        return survivors

    def _num_visual(self, item: _Choosing) -> int:
        prompt_rows = item.visual.shape[0]
        text = item.request.layout.num_tokens - item.request.layout.num_visual
        return prompt_rows - text

    def _instruction_attention(
        self,
        layer: Any,
        positions: Tensor,
        hidden: Tensor,
        residual: Tensor | None,
        item: _Choosing,
    ) -> Tensor:
        """Attention of the text rows behind the last image to the visual rows, in `layer`."""
        if residual is None:
            normed = layer.input_layernorm(hidden)
        else:
            # the fused norm works in place, and the rows go on to the real layer
            normed, _ = layer.input_layernorm(hidden.clone(), residual.clone())
        self._capturing = True
        try:
            # the layer's own projections, norms and RoPE run; `_capture` stops before attention
            layer.self_attn(positions=positions, hidden_states=normed)
            raise AssertionError("attention was not reached")
        except _QKSeen as seen:
            query, key = seen.query, seen.key
        finally:
            self._capturing = False
        attn = layer.self_attn.attn
        num_rows = hidden.shape[0]
        text_rows = torch.arange(
            num_rows - item.request.layout.num_text_after, num_rows, device=self._device
        )
        q = query.view(num_rows, attn.num_heads, attn.head_size)[text_rows].transpose(0, 1)
        k = key.view(num_rows, attn.num_kv_heads, attn.head_size).transpose(0, 1)
        with self._stats.time(Op.INSTRUCTION_ATTENTION):
            score = instruction_attention(
                q, k, text_rows, item.visual, scale=float(attn.impl.scale)
            )
        tp = get_tp_group()
        # every rank holds an equal share of the heads, so the mean of means is the mean
        return tp.all_reduce(score) / tp.world_size if tp.world_size > 1 else score

    def _capture(self, attn: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and self._capturing:
            raise _QKSeen(args[0], args[1])
