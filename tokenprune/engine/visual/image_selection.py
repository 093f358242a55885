"""Turns the choice from each image of a request into the rows of every stage of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFeatureSpec

from tokenprune.engine.families.base import ImageScores
from tokenprune.engine.guard import PolicyGuard, checked, evenly
from tokenprune.engine.visual.image_scores import ImageScorer
from tokenprune.policies import ImageInputs, ImagePlan, ImagePolicy, PerImage


@dataclass(slots=True)
class ImageSelection:
    """A request of the step whose images are chosen from one by one.

    Attributes:
        index: Place in the batch.
        policy: Who chooses.
        images: Images of the chunk.
        features: What vLLM knows of each.
        start: Prompt position of the chunk's first row.
        count: Rows of the chunk.
        guard: Asks the policy.
        scores: Scores of each image, once there are any.
    """

    index: int
    policy: ImagePolicy
    images: Sequence[ImagePlan]
    features: Sequence[MultiModalFeatureSpec]
    start: int
    count: int
    guard: PolicyGuard
    scores: list[ImageScores] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        index: int,
        plan: PerImage,
        request_id: str,
        chunk: range,
        scorer: ImageScorer,
        guard: PolicyGuard,
    ) -> ImageSelection:
        """Return the selection among the rows of a chunk of prompt positions."""
        images = [i for i in plan.images if i.start in chunk]
        assert all(i.end <= chunk.stop for i in images), "the scheduler must not cut an image"
        known = scorer.features_of(request_id)
        features = [known[i.start] for i in images]
        return cls(index, plan.policy, images, features, chunk.start, len(chunk), guard)

    def score(self, scorer: ImageScorer) -> None:
        """Get the scores of every image."""
        self.scores = [scorer.scores_of(feature, self.policy) for feature in self.features]

    def choose(
        self, hidden: Tensor, num_stages: int
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Choose from every image.

        Args:
            hidden: `[count, C]` the chunk's rows before the first layer.
            num_stages: Stages of the engine.

        Returns:
            Per stage the kept rows of the chunk, ascending; and per image the places of its rows
            among those of the first stage, with what they become there.
        """
        rows = torch.arange(self.count, device=hidden.device)
        parts: list[list[Tensor]] = [[] for _ in range(num_stages)]
        chosen, done = [], 0
        for image, found in zip(self.images, self.scores, strict=True):
            spans = [(first - self.start, end - self.start) for first, end in image.spans]
            own = torch.cat([rows[first:end] for first, end in spans])
            stages, features = self._select(
                ImageInputs(
                    kept=image.kept,
                    features=hidden[own],
                    importance=found.importance,
                    grids=found.grids,
                    is_video=found.is_video,
                )
            )
            # text stays, also between the frames of a video
            text = []
            for first, end in spans:
                text.append(rows[done:first])
                done = end
            for part, kept in zip(parts, stages, strict=True):
                part += [*text, own[kept]]
            chosen.append((own[stages[0]], features))
        kept_rows = [torch.cat([*part, rows[done:]]).sort().values for part in parts]
        return kept_rows, [(torch.searchsorted(kept_rows[0], own), new) for own, new in chosen]

    def _select(self, inputs: ImageInputs) -> tuple[list[Tensor], Tensor]:
        def compute() -> tuple[list[Tensor], Tensor]:
            stages, features = self.policy.select_image(inputs)
            stages = [checked(s, (k,)) for s, k in zip(stages, inputs.kept, strict=True)]
            return stages, checked(features, (inputs.kept[0], inputs.features.shape[1]))

        def instead() -> tuple[list[Tensor], Tensor]:
            kept = torch.arange(len(inputs.features), device=inputs.features.device)
            stages = []
            for keep in inputs.kept:
                kept = kept[evenly(len(kept), keep, kept.device)]
                stages.append(kept)
            return stages, inputs.features[stages[0]]

        return self.guard.ask(self.policy, compute, instead)
