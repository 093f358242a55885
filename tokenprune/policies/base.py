"""What a policy is: `plan` counts in integers, `select` chooses in tensors.

`plan` is pure and torch-free, so the API process, the scheduler and the worker each make the
same plan from the same request. `select` runs in the worker only. How many survive never
depends on data; which survive may.

Ties, for every method: the higher score first, then the lower index; kept indices ascend.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tokenprune.errors import PolicyError
from tokenprune.lengths import PhysicalLengths, PromptLayout

if TYPE_CHECKING:
    from torch import Tensor

Axis = Literal["visual", "kv", "channels"]


@dataclass(frozen=True, slots=True)
class EngineShape:
    """What a plan must know of the engine; equal in every process.

    Attributes:
        num_layers: Decoder layers.
        boundaries: First layer of each stage, ascending, beginning with 0.
        max_num_batched_tokens: Tokens one scheduler step can hold.
        unsupported: Why visual tokens cannot be pruned in this model, or None.
        kv_unsupported: Why KV tokens cannot be evicted in this engine, or None.
        max_model_len: Longest context, or None where nothing bounds it.
        importance_unsupported: Why patches cannot be scored in this model's vision tower, or None.
        allow_channels: Whether the engine was started to prune KV channels.
        channels_unsupported: Why KV channels cannot be pruned in this engine, or None.
        head_size: Channels of a key, and of a value, in one head.
        block_size: Slots of a KV block.
    """

    num_layers: int
    boundaries: tuple[int, ...]
    max_num_batched_tokens: int
    unsupported: str | None = None
    kv_unsupported: str | None = None
    max_model_len: int | None = None
    importance_unsupported: str | None = None
    allow_channels: bool = False
    channels_unsupported: str | None = None
    head_size: int = 0
    block_size: int = 0

    @property
    def prune_layers(self) -> tuple[int, ...]:
        """The boundaries a user may name, which is all but the constant 0."""
        return self.boundaries[1:]

    def stage_sizes(self) -> tuple[int, ...]:
        """Number of layers of each stage."""
        ends = (*self.boundaries[1:], self.num_layers)
        return tuple(end - start for start, end in zip(self.boundaries, ends, strict=True))

    def longest_context(self, num_prompt_tokens: int, max_tokens: int | None) -> int | None:
        """Return the most tokens a request can come to, or None where nothing bounds it."""
        if max_tokens is None:
            return self.max_model_len
        longest = num_prompt_tokens + max_tokens
        return longest if self.max_model_len is None else min(longest, self.max_model_len)


class PlanSkipped(Exception):
    """The request is served unpruned on this axis; `reason` is a label of the fallback metric."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


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


class Policy(BaseModel, abc.ABC):
    """A named method with its parameters; immutable once made.

    Attributes:
        axis: What it prunes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    axis: ClassVar[Axis]


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


class ScheduledPolicy(VisualPolicy):
    """A visual method with TransPrune's schedule of cuts.

    Baselines share it, so equal `keep_ratio` means equal work and only the choice differs.
    """

    # TransPrune's published schedule, "High" (arXiv 2507.20630: cuts after layers 7, 9, 12 of
    # 32)
    published_depth: ClassVar[int] = 32
    published_layers: ClassVar[tuple[int, ...]] = (7, 9, 12)
    published_ratios: ClassVar[tuple[float, ...]] = (0.875, 0.625, 0.125)

    keep_ratio: float = Field(
        default=0.125,
        gt=0,
        le=1,
        description="Share of the visual tokens that survives the last cut; earlier cuts follow "
        "the published proportions. 1 keeps everything.",
    )
    prune_layers: list[int] | None = Field(
        default=None,
        min_length=1,
        description="Layers to cut before; each must be a stage boundary of the engine. "
        "Default: the published layers, scaled to the model and snapped to boundaries.",
    )
    keep_ratios: list[float] | None = Field(
        default=None,
        min_length=1,
        description="Share of the original visual tokens kept at each cut, not increasing, one "
        "for each of `prune_layers`. Replaces `keep_ratio`.",
    )

    @model_validator(mode="after")
    def _check_schedule(self) -> ScheduledPolicy:
        layers, ratios = self.prune_layers, self.keep_ratios
        if layers is not None and layers != sorted(set(layers)):
            raise ValueError(f"prune_layers must ascend without repeats, got {layers}")
        if ratios is None:
            return self
        if "keep_ratio" in self.model_fields_set:
            raise ValueError("keep_ratio and keep_ratios exclude each other; leave one out")
        if any(not 0 < r <= 1 for r in ratios):
            raise ValueError(f"keep_ratios must each be in (0, 1], got {ratios}")
        if ratios != sorted(ratios, reverse=True):
            raise ValueError(f"keep_ratios must not increase, got {ratios}")
        wanted = len(self.published_layers if layers is None else layers)
        if len(ratios) != wanted:
            raise ValueError(f"keep_ratios must have {wanted} values, got {len(ratios)}")
        return self

    def cuts(self, engine: EngineShape) -> tuple[tuple[int, float], ...]:
        """Return `(layer, keep ratio)` of each cut, on the engine's boundaries.

        Raises:
            PolicyError: A layer of `prune_layers` is no boundary, or the engine has none.
        """
        published = (p / self.published_depth for p in self.published_layers)
        layers = self.snapped(engine, self.prune_layers, published)
        # where two published cuts snap to one boundary the later, deeper one holds
        return tuple(dict(zip(layers, self._ratios(len(layers)), strict=True)).items())

    def _ratios(self, num_cuts: int) -> tuple[float, ...]:
        if self.keep_ratios is not None:
            return tuple(self.keep_ratios)
        if self.prune_layers is None:
            last = self.published_ratios[-1]
            shape = [(1 - r) / (1 - last) for r in self.published_ratios]
        else:
            shape = [(i + 1) / num_cuts for i in range(num_cuts)]
        # the last cut is exact: 1 - (1 - r) is not always r in floating point
        early = (1 - (1 - self.keep_ratio) * share for share in shape[:-1])
        return (*early, self.keep_ratio)


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


PolicyT = TypeVar("PolicyT", bound=Policy)
_registry: dict[tuple[Axis, str], type[Policy]] = {}


def register_policy(cls: type[PolicyT]) -> type[PolicyT]:
    """Add a policy to the registry under its axis and the one value of its `method` field."""
    method = cls.model_fields["method"].default
    if (cls.axis, method) in _registry:
        raise ValueError(f"{cls.axis} method {method!r} is already registered")
    _registry[cls.axis, method] = cls
    return cls


def policies(axis: str) -> dict[str, type[Policy]]:
    """Registered policies of one axis by method name, sorted."""
    return {name: cls for (a, name), cls in sorted(_registry.items()) if a == axis}
