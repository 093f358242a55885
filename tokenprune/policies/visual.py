"""What a visual policy is: cuts between decoder layers, and three ways to choose what survives."""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tokenprune.errors import PolicyError
from tokenprune.lengths import PhysicalLengths, PromptLayout
from tokenprune.policies.base import Axis, EngineShape, PlanSkipped, Policy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """How many tokens of one image each stage keeps.

    Attributes:
        start: Prompt position of its first token.
        end: Position behind its last token.
        kept: Its tokens kept, per engine stage.
    """

    start: int
    end: int
    kept: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VisualPlan:
    """How many visual tokens each stage keeps.

    Attributes:
        cuts: `(layer, keep ratio)` of each cut, on engine boundaries, layers ascending.
        kept: Visual tokens kept, per engine stage.
        ranks: Per engine stage the kept visual tokens, counted from the first visual token of
            the prompt, ascending; None where the choice needs the prompt's tensors.
        lengths: The physical lengths that follow.
        images: Counts of each image, ascending, where each is chosen from by itself. Which tokens
            stay is then known before the decoder runs, but not from integers: `lengths` names
            the last tokens of an image in their place, so it holds wherever no image is cut in
            two. `chunk_end` keeps to that.
    """

    cuts: tuple[tuple[int, float], ...]
    kept: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...] | None
    lengths: PhysicalLengths
    images: tuple[ImagePlan, ...] = ()

    def chunk_end(self, end: int) -> int:
        """Return the last position up to `end` before which a chunk of the prompt may end."""
        return next((i.start for i in self.images if i.start < end < i.end), end)


@dataclass(frozen=True, slots=True)
class SelectInputs:
    """What the worker hands to `select` at one cut, for one request.

    Attributes:
        keep: How many of the `N` current visual tokens must survive.
        num_visual: `N`, the visual tokens that reached this layer.
        accumulated: `[N]` float32 sum of `VisualPolicy.observe` over the layers so far, or None.
        instruction_attention: Computes `[N]` float32, the mean attention of the prompt's text
            rows behind the last image to the visual tokens, at the layer after the cut.
    """

    keep: int
    num_visual: int
    accumulated: Tensor | None
    instruction_attention: Callable[[], Tensor]


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
        grids: `(tokens, width)` of the grids of tokens behind each other.
        is_video: Whether these are the frames of a video.
    """

    kept: tuple[int, ...]
    features: Tensor
    importance: Tensor
    grids: tuple[tuple[int, int], ...]
    is_video: bool


class VisualPolicy(Policy):
    """A method that drops visual tokens at cuts between decoder layers, during prefill.

    A cut before layer `b` means that layers `b` and later neither compute nor cache the dropped
    tokens. Every ratio of a cut counts from the *original* number of visual tokens, rounded down.

    The choice is made in one of three ways:

    * from integers alone: override `keep_ranks`;
    * from the whole prompt (`needs_whole_prompt`): override `select`, and `observe`;
    * from each image by itself (`chooses_per_image`): override `score_key`, `score_crop` and
      `select_image`. Counts are rounded per image, and a chunk of the prompt never ends inside one.
    """

    axis: ClassVar[Axis] = "visual"
    needs_whole_prompt: ClassVar[bool] = False
    chooses_per_image: ClassVar[bool] = False

    @abc.abstractmethod
    def cuts(self, engine: EngineShape) -> tuple[tuple[int, float], ...]:
        """Return `(layer, keep ratio)` of each cut, on the engine's boundaries.

        Raises:
            PolicyError: A layer of `prune_layers` is no boundary, or the engine has none.
        """

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
                f"{list(engine.boundaries)}, got {wrong}",
                "pruning.visual.prune_layers",
            )
        return tuple(layers)

    def plan(self, prompt: PromptLayout, engine: EngineShape) -> VisualPlan:
        """Count what each stage keeps.

        Raises:
            PlanSkipped: There is nothing to prune, or this prompt cannot be pruned.
            PolicyError: The schedule does not fit the engine.
        """
        # before the schedule: without support there are no boundaries by default either
        if engine.unsupported is not None:
            raise PlanSkipped("model_unsupported")
        cuts = self.cuts(engine)
        total = prompt.num_visual
        if total == 0:
            raise PlanSkipped("no_visual_tokens")
        # the first token is sampled from the last row of the prompt, so that row must survive
        if prompt.num_text_after == 0:
            raise PlanSkipped("no_text_after_image")
        if self.needs_whole_prompt and prompt.num_tokens > engine.max_num_batched_tokens:
            raise PlanSkipped("prompt_exceeds_batch")
        if self.chooses_per_image:
            return self._plan_images(prompt, engine, cuts)

        kept = _kept(total, cuts, engine)
        ranks: tuple[tuple[int, ...], ...] | None = None
        dropped: tuple[tuple[int, ...] | int, ...]
        if self.needs_whole_prompt:
            dropped = tuple(total - k for k in kept)
        else:
            ranks = self._nested_ranks(total, kept)
            positions = prompt.visual_positions()
            dropped = tuple(
                tuple(positions[r] for r in sorted(set(range(total)).difference(stage)))
                for stage in ranks
            )
        return VisualPlan(cuts, kept, ranks, PhysicalLengths(prompt.num_tokens, dropped))

    def _plan_images(
        self, prompt: PromptLayout, engine: EngineShape, cuts: tuple[tuple[int, float], ...]
    ) -> VisualPlan:
        if engine.importance_unsupported is not None:
            raise PlanSkipped("importance_unsupported")
        spans = prompt.visual_spans
        if max(end - start for start, end in spans) > engine.max_num_batched_tokens:
            raise PlanSkipped("image_exceeds_batch")
        images = tuple(
            ImagePlan(start, end, _kept(end - start, cuts, engine)) for start, end in spans
        )
        stages = range(len(engine.boundaries))
        dropped = tuple(
            tuple(p for i in images for p in range(i.start + i.kept[stage], i.end))
            for stage in stages
        )
        kept = tuple(sum(i.kept[stage] for i in images) for stage in stages)
        lengths = PhysicalLengths(prompt.num_tokens, dropped)
        return VisualPlan(cuts, kept, None, lengths, images)

    def _nested_ranks(self, total: int, kept: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        stages, current = [], tuple(range(total))
        for keep in kept:
            if keep < len(current):
                current = tuple(current[i] for i in self.keep_ranks(len(current), keep))
            stages.append(current)
        return tuple(stages)

    def keep_ranks(self, num_visual: int, keep: int) -> list[int]:
        """Return which `keep` of `num_visual` tokens survive a cut, ascending, without tensors."""
        raise NotImplementedError(f"{type(self).__name__} chooses by tensors")

    def observed_layers(self, engine: EngineShape) -> range:
        """Layers whose sub-modules `observe` wants to see, 0-based."""
        return range(0)

    def observe(self, x_in: Tensor, x_out: Tensor, visual: Tensor) -> Tensor:
        """Score one sub-module: `[n, C]`, `[n, C]`, bool `[n]` -> float32 `[n_visual]`."""
        raise NotImplementedError(f"{type(self).__name__} observes no layer")

    def select(self, inputs: SelectInputs) -> Tensor:
        """Return the indices of the kept visual tokens, int64 `[keep]`, ascending."""
        raise NotImplementedError(f"{type(self).__name__} chooses without tensors")

    def score_key(self) -> Hashable:
        """Return what `score_crop` depends on besides the crop; equal keys share their scores."""
        raise NotImplementedError(f"{type(self).__name__} scores no image")

    def score_crop(self, inputs: CropInputs) -> Tensor:
        """Return the importance of a crop's patches, float32 `[N]`."""
        raise NotImplementedError(f"{type(self).__name__} scores no image")

    def select_image(self, inputs: ImageInputs) -> tuple[list[Tensor], Tensor]:
        """Choose the tokens of one image.

        Returns:
            Per engine stage the indices of the kept tokens, int64 `[kept]`, ascending and each
            among those of the stage before; and the features of the first stage's tokens,
            `[kept[0], C]`.
        """
        raise NotImplementedError(f"{type(self).__name__} scores no image")


def _kept(total: int, cuts: tuple[tuple[int, float], ...], engine: EngineShape) -> tuple[int, ...]:
    """Return what each stage keeps of `total` tokens, at least one."""
    counts = {layer: max(1, int(total * ratio)) for layer, ratio in cuts}
    kept, current = [], total
    for boundary in engine.boundaries:
        current = counts.get(boundary, current)
        kept.append(current)
    return tuple(kept)


def _nearest(boundaries: tuple[int, ...], layer: float) -> int:
    return min(boundaries, key=lambda b: (abs(b - layer), b))


def top_ranks(score: Tensor, keep: int) -> Tensor:
    """Return the indices of the `keep` highest scores, ascending; ties keep the lower index."""
    return score.sort(descending=True, stable=True).indices[:keep].sort().values
