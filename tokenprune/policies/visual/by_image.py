"""Visual methods that choose from each image by itself, before the decoder runs."""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenprune.lengths import DroppedOfImages, PromptLayout
from tokenprune.policies.base import PlanSkipped
from tokenprune.policies.visual.base import Cuts, VisualPlan, VisualPolicy, kept_per_stage
from tokenprune.shape import EngineShape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """How many tokens of one image each stage keeps.

    Attributes:
        spans: Half-open ranges of prompt positions of its tokens, ascending; more than one where
            text stands between them, as between the frames of some videos.
        kept: Its tokens kept, per engine stage.
    """

    spans: tuple[tuple[int, int], ...]
    kept: tuple[int, ...]

    @property
    def start(self) -> int:
        """Prompt position of its first token."""
        return self.spans[0][0]

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.spans[-1][1]

    @property
    def num_tokens(self) -> int:
        """Its tokens."""
        return sum(end - start for start, end in self.spans)

    def held(self, stage: int) -> int:
        """Return how many tokens from its first to its last a stage holds, text included."""
        return self.end - self.start - self.num_tokens + self.kept[stage]


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
            DroppedOfImages(tuple((i.start, i.end, i.held(stage)) for i in self.images))
            for stage in range(len(self.kept))
        )

    @property
    def shared_tokens(self) -> int:
        """Those before the first image, whose features may be merged."""
        return self.images[0].start

    def chunk_end(self, end: int) -> int:
        """Return the last position up to `end` that is not inside an image."""
        return next((i.start for i in self.images if i.start < end < i.end), end)

    def summary(self) -> dict[str, str]:
        """What was applied: its `keep_ratio` is a mean over layers, so each cut says its share."""
        shares = ",".join(f"{share:.3g}" for _, share in self.cuts)
        return {"keep_ratios": shares, "layers": self._layers()}


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
        images = prompt.spans_of_images()
        longest = max(spans[-1][1] - spans[0][0] for spans in images)
        if longest > engine.max_num_batched_tokens:
            raise PlanSkipped(
                "image_exceeds_batch",
                f"an image must have at most {engine.max_num_batched_tokens} tokens for "
                f"pruning.visual.method {self.name}, which takes it in one step, got {longest}; "
                "raise --max-num-batched-tokens or use another method",
                "pruning.visual.method",
            )
        plans = tuple(
            ImagePlan(spans, kept_per_stage(sum(e - s for s, e in spans), cuts, engine))
            for spans in images
        )
        kept = tuple(sum(plan.kept[stage] for plan in plans) for stage in range(engine.num_stages))
        return PerImage(self, cuts, kept, plans)
