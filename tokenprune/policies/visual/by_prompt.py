"""Visual methods that choose from the whole prompt, between the decoder's layers."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenprune.lengths import DroppedAfterPrompt, PromptLayout
from tokenprune.policies.base import PlanSkipped
from tokenprune.policies.visual.base import Cuts, VisualPlan, VisualPolicy, kept_per_stage
from tokenprune.shape import EngineShape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class AfterPrompt(VisualPlan):
    """Which tokens survive follows from the tensors of the whole prompt, prefilled in one step.

    Attributes:
        policy: Who chooses.
        prompt: Where the visual tokens are.
    """

    policy: PromptPolicy
    prompt: PromptLayout

    @property
    def dropped(self) -> tuple[DroppedAfterPrompt, ...]:
        """Per engine stage, how many are not kept."""
        total = self.prompt.num_visual
        return tuple(DroppedAfterPrompt(total - k, self.prompt.num_tokens) for k in self.kept)


@dataclass(frozen=True, slots=True)
class SelectInputs:
    """What the worker hands to `select` at one cut, for one request.

    Attributes:
        keep: How many of the `N` current visual tokens must survive.
        num_visual: `N`, the visual tokens that reached this layer.
        accumulated: `[N]` float32 sum of `PromptPolicy.observe` over the layers so far, or None.
        instruction_attention: Computes `[N]` float32, the mean attention of the prompt's text
            rows after the last image to the visual tokens, at the layer after the cut.
    """

    keep: int
    num_visual: int
    accumulated: Tensor | None
    instruction_attention: Callable[[], Tensor]


class PromptPolicy(VisualPolicy):
    """A visual method that chooses from the whole prompt, which is prefilled in one step."""

    @abc.abstractmethod
    def select(self, inputs: SelectInputs) -> Tensor:
        """Return the indices of the kept visual tokens, int64 `[keep]`, ascending."""

    def observed_layers(self, engine: EngineShape) -> range:
        """Layers whose sub-modules `observe` is shown, 0-based."""
        return range(0)

    def observe(self, x_in: Tensor, x_out: Tensor, visual: Tensor) -> Tensor:
        """Score one sub-module of an observed layer.

        Args:
            x_in: `[n, C]` its input, after the norm.
            x_out: `[n, C]` its output, before it is added to the residual.
            visual: `[n]` bool, which rows are visual.

        Returns:
            `[n_visual]` float32; zeros add nothing to `SelectInputs.accumulated`.
        """
        return x_in.new_zeros(int(visual.sum())).float()

    def count(self, prompt: PromptLayout, engine: EngineShape, cuts: Cuts) -> AfterPrompt:
        """Return the plan, which counts over the whole prompt.

        Raises:
            PlanSkipped: The prompt is longer than a step.
        """
        if prompt.num_tokens > engine.max_num_batched_tokens:
            raise PlanSkipped(
                "prompt_exceeds_batch",
                f"the prompt must have at most {engine.max_num_batched_tokens} tokens for "
                f"pruning.visual.method {self.name}, which scores it in one step, got "
                f"{prompt.num_tokens}; raise --max-num-batched-tokens or use another method",
                "pruning.visual.method",
            )
        return AfterPrompt(self, cuts, kept_per_stage(prompt.num_visual, cuts, engine), prompt)
