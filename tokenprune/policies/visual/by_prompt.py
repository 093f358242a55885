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
    """Which tokens survive follows from the tensors of the whole prompt.

    At the first cut that drops any, rows wait until the prompt is complete.

    Attributes:
        policy: Who chooses.
        prompt: Where the visual tokens are.
        first: Position of the first token that waits; text before it does not depend on the choice.
        rows_per_token: Rows that a waiting token takes: one, and one for each later layer after
            which the model adds features to it; 0 where nothing is dropped.
    """

    policy: PromptPolicy
    prompt: PromptLayout
    first: int
    rows_per_token: int

    @property
    def shared_tokens(self) -> int:
        """Text before the first image, where it goes ahead."""
        return self.first

    def waiting_rows(self, num_computed: int) -> int:
        """Return the rows that wait once `num_computed` tokens are, the last of them too."""
        return max(0, num_computed - self.first) * self.rows_per_token

    @property
    def dropped(self) -> tuple[DroppedAfterPrompt, ...]:
        """Per engine stage, how many are not kept."""
        total = self.prompt.num_visual
        return tuple(
            DroppedAfterPrompt(total - k, self.prompt.num_tokens, self.first) for k in self.kept
        )


@dataclass(frozen=True, slots=True)
class SelectInputs:
    """What the worker hands to `select` at one cut, for one request.

    Attributes:
        keep: How many of the `N` current visual tokens must survive.
        num_visual: `N`, the visual tokens that reached this layer.
        accumulated: `[N]` float32 sum of the scores by `PromptPolicy.observe` over the layers so
            far, or None.
        instruction_attention: Computes `[N]` float32, the mean attention of the prompt's text
            rows after the last image to the visual tokens, at the layer after the cut.
    """

    keep: int
    num_visual: int
    accumulated: Tensor | None
    instruction_attention: Callable[[], Tensor]


class PromptPolicy(VisualPolicy):
    """A visual method that chooses from the whole prompt, however that is cut into chunks."""

    @abc.abstractmethod
    def select(self, inputs: SelectInputs) -> Tensor:
        """Return the indices of the kept visual tokens, int64 `[keep]`, ascending."""

    def observed_layers(self, engine: EngineShape) -> range:
        """Layers whose sub-modules `observe` is shown, 0-based."""
        return range(0)

    def observe(self, x_in: Tensor, x_out: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Score one sub-module of an observed layer, for a chunk of the prompt.

        Args:
            x_in: `[n, C]` its input, after the norm; the prompt's rows of the step from the first
                visual one on, so that what comes of it does not depend on text that was cached.
            x_out: `[n, C]` its output, before it is added to the residual.
            visual: `[n]` bool, which rows are visual.

        Returns:
            `[n_visual]` and `[]` float32. A token's score is its number over the sum of the second
            of all chunks; the number itself where that sum is 0.
        """
        return x_in.new_zeros(int(visual.sum())).float(), x_in.new_zeros(()).float()

    def count(self, prompt: PromptLayout, engine: EngineShape, cuts: Cuts) -> AfterPrompt:
        """Return the plan, which counts over the whole prompt.

        Raises:
            PlanSkipped: More rows would have to wait than the engine has room for.
        """
        kept = kept_per_stage(prompt.num_visual, cuts, engine)
        # layers that run only when the prompt is complete, and get features from outside
        waiting = [b for b, k in zip(engine.boundaries, kept, strict=True) if k < prompt.num_visual]
        per_token = 1 + max(0, engine.num_late - waiting[0]) if waiting else 0
        # keys of text that has gone ahead are read in the KV cache again
        first = 0 if "kv" in engine.unsupported else prompt.visual_spans[0][0]
        plan = AfterPrompt(self, cuts, kept, prompt, first, per_token)
        room = engine.max_num_waiting_tokens
        if room is not None and plan.waiting_rows(prompt.num_tokens) > room:
            raise PlanSkipped(
                "prompt_exceeds_waiting_tokens",
                f"the prompt must have at most {room // per_token} tokens from the first image on "
                f"for pruning.visual.method {self.name}, which chooses once it is complete, got "
                f"{prompt.num_tokens - first}; raise --max-num-waiting-tokens or use another "
                "method",
                "pruning.visual.method",
            )
        return plan
