"""What a visual policy is: cuts between decoder layers, and three ways to choose what survives.

Each way is a base class with a plan of its own kind:

| base class | knows what survives | plan |
|---|---|---|
| `RankPolicy` (`by_rank.py`) | from integers alone | `KnownRows` |
| `ImagePolicy` (`by_image.py`) | from each image by itself, before the decoder | `PerImage` |
| `PromptPolicy` (`by_prompt.py`) | from the whole prompt, between its layers | `AfterPrompt` |
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tokenprune.errors import PolicyError, shown
from tokenprune.lengths import Dropped, PromptLayout
from tokenprune.policies.base import Axis, PlanSkipped, Policy
from tokenprune.shape import EngineShape, ModelShape

if TYPE_CHECKING:
    from torch import Tensor

# `(layer, keep ratio)` of each cut, layers ascending
Cuts = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class VisualPlan(abc.ABC):
    """How many visual tokens each stage keeps.

    Attributes:
        policy: Who chooses them.
        cuts: `(layer, keep ratio)` of each cut, on engine boundaries, layers ascending.
        kept: Visual tokens kept, per engine stage.
    """

    policy: VisualPolicy
    cuts: Cuts
    kept: tuple[int, ...]

    @property
    @abc.abstractmethod
    def dropped(self) -> tuple[Dropped, ...]:
        """Per engine stage, the prompt tokens it never holds."""

    @property
    def shared_tokens(self) -> int:
        """First tokens of the prompt that are computed as those of an unpruned request."""
        return 0

    def chunk_end(self, end: int) -> int:
        """Return the last position up to `end` before which a chunk of the prompt may end."""
        return end

    def summary(self) -> dict[str, str]:
        """What was applied, as the response header gives it."""
        return {"keep_ratio": f"{self.cuts[-1][1]:g}", "layers": self._layers()}

    def _layers(self) -> str:
        return ",".join(str(layer) for layer, _ in self.cuts)


class VisualPolicy(Policy):
    """A method that drops visual tokens at cuts between decoder layers, during prefill.

    A cut before layer `b` means that layers `b` and later neither compute nor cache the dropped
    tokens. Every ratio of a cut counts from the *original* number of visual tokens, rounded down.

    A method derives from one of `RankPolicy`, `ImagePolicy` and `PromptPolicy`.
    """

    axis: ClassVar[Axis] = "visual"

    @abc.abstractmethod
    def cuts(self, engine: EngineShape) -> Cuts:
        """Return `(layer, keep ratio)` of each cut, on the engine's boundaries.

        Raises:
            PolicyError: A layer of `prune_layers` is no boundary, or the engine has none.
        """

    @abc.abstractmethod
    def count(self, prompt: PromptLayout, engine: EngineShape, cuts: Cuts) -> VisualPlan:
        """Return the plan of a prompt that has visual tokens, and text after them.

        Raises:
            PlanSkipped: This prompt cannot be pruned.
        """

    def plan(self, prompt: PromptLayout, engine: EngineShape) -> VisualPlan:
        """Count what each stage keeps.

        Raises:
            PlanSkipped: There is nothing to prune, or this prompt cannot be pruned.
            PolicyError: The schedule does not fit the engine.
        """
        unsupported = engine.unsupported.get("visual")
        # before the schedule: without support there are no boundaries by default either
        if unsupported is not None:
            message = f"pruning.visual must be left out with this model: {unsupported}"
            raise PlanSkipped(
                "model_unsupported", message if prompt.num_visual else None, "pruning.visual"
            )
        cuts = self.cuts(engine)
        if prompt.num_visual == 0:
            raise PlanSkipped("no_visual_tokens")
        # the first token is sampled from the last row of the prompt, so that row must survive
        if prompt.num_text_after == 0:
            raise PlanSkipped("no_text_after_image")
        return self.count(prompt, engine, cuts)

    def snapped(
        self, engine: EngineShape, layers: list[int] | None, published: Iterable[float]
    ) -> tuple[int, ...]:
        """Return the layers asked for, or the boundaries nearest to the published ones.

        Args:
            engine: Where.
            layers: Value of `prune_layers`.
            published: Where the method's authors cut, as shares of the depth.

        Raises:
            PolicyError: A layer asked for is no boundary, or the engine has none.
        """
        if not engine.prune_layers:
            raise PolicyError(
                "visual pruning needs stage boundaries, got an engine without any; "
                "start it with --prune-layers",
                "pruning.visual.method",
            )
        if layers is None:
            return tuple(_nearest(engine.prune_layers, p * engine.num_layers) for p in published)
        wrong = [b for b in layers if b not in engine.boundaries]
        if wrong:
            raise PolicyError(
                "pruning.visual.prune_layers must be among the engine's boundaries "
                f"{list(engine.boundaries)}, got {shown(wrong)}",
                "pruning.visual.prune_layers",
            )
        return tuple(layers)

    def score_macs(
        self, plan: VisualPlan, prompt: PromptLayout, engine: EngineShape, model: ModelShape
    ) -> int:
        """Return the multiply-accumulates that choosing costs in the decoder, for one prompt."""
        return 0


def kept_per_stage(total: int, cuts: Cuts, engine: EngineShape) -> tuple[int, ...]:
    """Return what each stage keeps of `total` tokens, at least one."""
    counts = {layer: max(1, int(total * ratio)) for layer, ratio in cuts}
    kept, current = [], total
    for boundary in engine.boundaries:
        current = counts.get(boundary, current)
        kept.append(current)
    return tuple(kept)


def _nearest(boundaries: tuple[int, ...], layer: float) -> int:
    return min(boundaries, key=lambda b: (abs(b - layer), b))


def top_k(score: Tensor, keep: int) -> Tensor:
    """Return the indices of the `keep` highest scores, ascending.

    NaN ranks lowest; ties keep the lower index.
    """
    from tokenprune.kernels.ops.ranking import descending_order

    return descending_order(score)[:keep].sort().values
