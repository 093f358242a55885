"""VFlowOpt: keep the patches that the image itself attends to, and merge the others into them.

Each patch of a crop gets an importance from the vision tower alone, without the question:

    I_i = sum over k in K of A_ki + alpha * softmax_i(H)

with A the attention of the tower's last executed layer (mean over heads), K the patches that
receive more than `threshold` times the mean, and H the entropy of the patch's grey values in
bits. The map is laid out as the features are: tiles put together, unpadded, resized; line breaks
are infinitely important, so they stay as long as there is room, and count like any token.

Stage 0 is a cut before the first layer: the least important tokens of a cell of the grid are
merged into the most important of them. Stages 1 and 2 drop the least important of the rest
between layers, by the same map; a merged token has the importance of the one whose place it took.

Source: Yang et al. 2025, arXiv 2508.05211; code sihany077/VFlowOpt@129eeef, of which nothing is
copied. We follow the paper in the sum over K (code: mean), and the code in bits, in one map per
crop, in importances of line breaks (1.0 there) and in not merging frames of a video.

Where we leave both: exactly as many rows are kept as planned (the code: as many as cells happen
to be occupied); entropy is taken from raw pixels; positions stay original; every image of a
request is pruned by itself, one-crop images too; without a patch in K the column means stand in;
negative importances weigh nothing when tokens are merged; the class token of a CLIP tower is left
out of the attention before its softmax, which neither says.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate, pairwise
from operator import mul
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from tokenprune.errors import shown
from tokenprune.policies.base import register_policy
from tokenprune.policies.visual.base import Cuts, top_k
from tokenprune.policies.visual.by_image import CropInputs, ImageInputs, ImagePolicy
from tokenprune.shape import EngineShape

if TYPE_CHECKING:
    from torch import Tensor

# the published optima of LLaVA-OneVision-7B: overall ratio -> shares left after stages 0, 1, 2
_PUBLISHED = {
    0.1: (0.11661529508161146, 1.0, 0.6011),
    0.25: (0.2651026358526424, 0.9833433139039235, 0.8773258179532721),
    0.5: (0.7233201448753168, 0.748747637472693, 0.487),
    1.0: (1.0, 1.0, 1.0),
}


@register_policy
class VFlowOpt(ImagePolicy):
    """Keep the tokens of each image that its own patches attend to, merging dropped ones first.

    The choice needs no text, so prompts may come in chunks; an image may not be longer than the
    engine's `max_num_batched_tokens`.
    """

    # 0-based layers 9 and 18 of 28; LLaVA-NeXT's 10 and 20 of 32 are next to them
    published_layers: ClassVar[tuple[float, ...]] = (9 / 28, 18 / 28)

    method: Literal["vflowopt"] = "vflowopt"
    keep_ratio: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="Share of the visual tokens that is kept, as the mean over the decoder's "
        "layers. How it is spread over the three stages follows the published optima. 1 keeps "
        "everything.",
    )
    stages: list[float] | None = Field(
        default=None,
        max_length=3,
        description="Three shares, each of the tokens that are left, kept before the first layer "
        "and at the two later cuts. Replaces `keep_ratio`.",
    )
    prune_layers: list[int] | None = Field(
        default=None,
        max_length=2,
        description="The two layers to cut before besides the first; each must be a stage "
        "boundary of the engine. Default: the published layers, scaled to the model and snapped "
        "to boundaries.",
    )
    threshold: float = Field(
        default=30.0,
        ge=0,
        le=65536,
        description="A patch counts as a key patch if it receives more than this many times the "
        "mean attention. Published: 28.7 to 39.3 with 729 patches.",
    )
    cell: float | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="Side in tokens of the cells in which dropped tokens are merged. "
        "Default: half the side of a crop. Published: 11.8 to 17.4 with crops of 27 x 27.",
    )
    alpha: float = Field(
        default=0.0,
        ge=-1000,
        le=1000,
        description="Weight of the patches' entropy against attention, of either sign. "
        "Published: 0.",
    )

    @model_validator(mode="after")
    def _check_stages(self) -> VFlowOpt:
        layers, stages = self.prune_layers, self.stages
        if layers is not None and (
            len(layers) != 2 or layers != sorted(set(layers)) or layers[0] < 1
        ):
            raise ValueError(
                f"prune_layers must be two layers after the first, got {shown(layers)}"
            )
        if stages is None:
            return self
        if "keep_ratio" in self.model_fields_set:
            raise ValueError("stages and keep_ratio exclude each other; leave one out")
        if len(stages) != 3 or any(not 0 < share <= 1 for share in stages):
            raise ValueError(f"stages must be three shares in (0, 1], got {shown(stages)}")
        return self

    def cuts(self, engine: EngineShape) -> Cuts:
        """Return `(layer, keep ratio)` of the three cuts, ratios of the original tokens.

        Raises:
            PolicyError: A layer of `prune_layers` is no boundary, or the engine has none.
        """
        layers = (0, *self.snapped(engine, self.prune_layers, self.published_layers))
        if self.stages is not None:
            shares = list(accumulate(self.stages, mul))
        else:
            sizes = [end - start for start, end in pairwise((*layers, engine.num_layers))]
            shares = spread(self.keep_ratio, sizes)
        # where both later cuts snap to one boundary the deeper one holds
        return tuple(dict(zip(layers, shares, strict=True)).items())

    def score_key(self) -> Hashable:
        """Return the parameters of the map."""
        return self.threshold, self.alpha

    def score_crop(self, inputs: CropInputs) -> Tensor:
        """Return the importance of a crop's patches."""
        from tokenprune.kernels import attention_importance, patch_entropy

        importance = attention_importance(
            inputs.query, inputs.key, threshold=self.threshold, scale=inputs.scale
        )
        if self.alpha:
            entropy = patch_entropy(inputs.pixels(), inputs.patch)
            importance = importance + self.alpha * entropy.softmax(0)
        return importance

    def select_image(self, inputs: ImageInputs) -> tuple[list[Tensor], Tensor]:
        """Keep the most important tokens; merge the others at the first stage."""
        from tokenprune.kernels import recycle

        if inputs.is_video:
            kept = top_k(inputs.importance, inputs.kept[0])
            features = inputs.features[kept]
        else:
            cell = self.cell if self.cell is not None else inputs.grids[0][1] / 2
            kept, features = recycle(
                inputs.features, inputs.importance, inputs.grids, inputs.kept[0], cell
            )
        stages = [kept]
        for keep in inputs.kept[1:]:
            kept = kept[top_k(inputs.importance[kept], keep)]
            stages.append(kept)
        return stages, features


def spread(keep_ratio: float, layers: Sequence[int]) -> list[float]:
    """Return the shares kept in three runs of layers whose mean over the layers is `keep_ratio`.

    The proportions are those of the published optima, linear in `keep_ratio` between them.

    Args:
        keep_ratio: In (0, 1].
        layers: Number of layers of each run.
    """
    if keep_ratio == 1:
        return [1.0] * len(layers)
    shape = _proportions(keep_ratio)
    whole = 0
    # shares above 1 are cut off, from the front because they fall; the rest takes the difference
    for i in range(len(layers)):
        rest = sum(n * share for n, share in zip(layers[i:], shape[i:], strict=True))
        scale = (keep_ratio * sum(layers) - whole) / rest
        if scale * shape[i] <= 1:
            return [1.0] * i + [scale * share for share in shape[i:]]
        whole += layers[i]
    return [1.0] * len(layers)


def _proportions(keep_ratio: float) -> list[float]:
    """Return the shares after each stage as multiples of the overall ratio."""
    points = [
        (ratio, [share / ratio for share in accumulate(stages, mul)])
        for ratio, stages in _PUBLISHED.items()
    ]
    keep_ratio = max(keep_ratio, points[0][0])
    (low, left), (high, right) = next(pair for pair in pairwise(points) if keep_ratio <= pair[1][0])
    part = (keep_ratio - low) / (high - low)
    return [a + part * (b - a) for a, b in zip(left, right, strict=True)]
