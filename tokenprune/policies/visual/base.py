"""What a visual policy is: cuts between decoder layers, and three ways to choose what survives.

Each way is a base class with a plan of its own kind:

| base class | knows what survives | plan |
|---|---|---|
| `RankPolicy` | from integers alone | `KnownRows` |
| `ImagePolicy` | from each image by itself, before the decoder | `PerImage` |
| `PromptPolicy` | from the whole prompt, between its layers | `AfterPrompt` |
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tokenprune.errors import PolicyError, shown
from tokenprune.lengths import (
    Dropped,
    DroppedAfterPrompt,
    DroppedOfImages,
    DroppedPositions,
    PromptLayout,
)
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

    def chunk_end(self, end: int) -> int:
        """Return the last position up to `end` before which a chunk of the prompt may end."""
        return end

    def summary(self) -> dict[str, str]:
        """What was applied, as the response header gives it."""
        return {"keep_ratio": f"{self.cuts[-1][1]:g}", "layers": self._layers()}

    def _layers(self) -> str:
        return ",".join(str(layer) for layer, _ in self.cuts)


@dataclass(frozen=True, slots=True)
class KnownRows(VisualPlan):
    """Which tokens survive is known from integers alone, so the prompt may come in chunks.

    Attributes:
        ranks: Per engine stage the kept visual tokens, counted from the first visual token of
            the prompt, ascending.
        positions: Prompt positions of the visual tokens, ascending.
    """

    ranks: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]

    @property
    def dropped(self) -> tuple[DroppedPositions, ...]:
        """Per engine stage, the positions that are not kept."""
        everything = set(range(len(self.positions)))
        return tuple(
            DroppedPositions(tuple(self.positions[r] for r in sorted(everything.difference(ranks))))
            for ranks in self.ranks
        )


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """How many tokens of one image each stage keeps.

    Attributes:
        start: Prompt position of its first token.
        end: Position after its last token.
        kept: Its tokens kept, per engine stage.
    """

    start: int
    end: int
    kept: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PerImage(VisualPlan):
    """Each image is chosen from by itself before the decoder runs, so none is cut in two.

    Attributes:
        policy: Who chooses.
        images: Counts of each image, ascending.
    """

    policy: ImagePolicy
    images: tuple[ImagePlan, ...]

    @property
    def dropped(self) -> tuple[DroppedOfImages, ...]:
        """Per engine stage, how many tokens of each image are not kept."""
        return tuple(
            DroppedOfImages(tuple((i.start, i.end, i.kept[stage]) for i in self.images))
            for stage in range(len(self.kept))
        )

    def chunk_end(self, end: int) -> int:
        """Return the last position up to `end` that is not inside an image."""
        return next((i.start for i in self.images if i.start < end < i.end), end)

    def summary(self) -> dict[str, str]:
        """What was applied: its `keep_ratio` is a mean over layers, so each cut says its share."""
        shares = ",".join(f"{share:.3g}" for _, share in self.cuts)
        return {"keep_ratios": shares, "layers": self._layers()}


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


class RankPolicy(VisualPolicy):
    """A visual method that chooses from integers alone."""

    @abc.abstractmethod
    def keep_ranks(self, num_visual: int, keep: int) -> list[int]:
        """Return which `keep` of `num_visual` tokens survive a cut, ascending."""

    def count(self, prompt: PromptLayout, engine: EngineShape, cuts: Cuts) -> KnownRows:
        """Return the plan, which names the tokens that survive."""
        kept = _kept(prompt.num_visual, cuts, engine)
        ranks, current = [], tuple(range(prompt.num_visual))
        for keep in kept:
            if keep < len(current):
                current = tuple(current[i] for i in self.keep_ranks(len(current), keep))
            ranks.append(current)
        return KnownRows(self, cuts, kept, tuple(ranks), tuple(prompt.visual_positions()))


@dataclass(frozen=True, slots=True)
class CropInputs:
    """One crop as the vision tower sees it: the whole image, a tile of it, or a frame.

    Attributes:
        query: `[H, N, D]` queries of the tower's last executed layer, without a class token.
        key: `[H, N, D]` keys.
        scale: Factor of the logits.
        pixels: Returns the crop, uint8 `[3, height, width]`.
        patch: Side of a patch in pixels.
    """

    query: Tensor
    key: Tensor
    scale: float
    pixels: Callable[[], Tensor]
    patch: int


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """What the worker hands to `select_image`: one image before the decoder's first layer.

    Attributes:
        kept: Tokens to keep, per engine stage, not increasing.
        features: `[N, C]` its tokens.
        importance: `[N]` float32, from `score_crop`, laid out as the features are; infinite for
            tokens that separate the rows of the image.
        grids: `(tokens, width)` of the grids of tokens one after the other.
        is_video: Whether these are the frames of a video.
    """

    kept: tuple[int, ...]
    features: Tensor
    importance: Tensor
    grids: tuple[tuple[int, int], ...]
    is_video: bool


class ImagePolicy(VisualPolicy):
    """A visual method that chooses from each image by itself, by scores of the vision tower.

    Counts are rounded per image, and a chunk of the prompt never ends inside one.
    """

    @abc.abstractmethod
    def score_key(self) -> Hashable:
        """Return what `score_crop` depends on besides the crop; equal keys share their scores."""

    @abc.abstractmethod
    def score_crop(self, inputs: CropInputs) -> Tensor:
        """Return the importance of a crop's patches, float32 `[N]`."""

    @abc.abstractmethod
    def select_image(self, inputs: ImageInputs) -> tuple[list[Tensor], Tensor]:
        """Choose the tokens of one image.

        Returns:
            Per engine stage the indices of the kept tokens, int64 `[kept]`, ascending and each
            among those of the stage before; and the features of the first stage's tokens,
            `[kept[0], C]`.
        """

    def count(self, prompt: PromptLayout, engine: EngineShape, cuts: Cuts) -> PerImage:
        """Return the plan, which counts per image.

        Raises:
            PlanSkipped: Images cannot be scored here, or one is longer than a step.
        """
        unsupported = engine.unsupported.get("importance")
        if unsupported is not None:
            raise PlanSkipped(
                "importance_unsupported",
                f"pruning.visual.method must be another than {self.name} with this server: "
                f"{unsupported}",
                "pruning.visual.method",
            )
        spans = prompt.visual_spans
        longest = max(end - start for start, end in spans)
        if longest > engine.max_num_batched_tokens:
            raise PlanSkipped(
                "image_exceeds_batch",
                f"an image must have at most {engine.max_num_batched_tokens} tokens for "
                f"pruning.visual.method {self.name}, which takes it in one step, got {longest}; "
                "raise --max-num-batched-tokens or use another method",
                "pruning.visual.method",
            )
        images = tuple(
            ImagePlan(start, end, _kept(end - start, cuts, engine)) for start, end in spans
        )
        kept = tuple(sum(i.kept[stage] for i in images) for stage in range(engine.num_stages))
        return PerImage(self, cuts, kept, images)


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
        return AfterPrompt(self, cuts, _kept(prompt.num_visual, cuts, engine), prompt)


def _kept(total: int, cuts: Cuts, engine: EngineShape) -> tuple[int, ...]:
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
    """Return the indices of the `keep` highest scores, ascending; ties keep the lower index."""
    return score.sort(descending=True, stable=True).indices[:keep].sort().values
