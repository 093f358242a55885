"""Turns the choice from each image of a request into the rows of every stage of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFeatureSpec

from tokenprune.engine.importance import ImageMap, ImageScorer
from tokenprune.engine.step import PrunedRequest
from tokenprune.policies import ImageInputs, ImagePlan, VisualPolicy


@dataclass(slots=True)
class ImagedRequest:
    """A request of the step whose images are chosen from one by one.

    Attributes:
        index: Place in the batch.
        images: Images of the chunk.
        features: What vLLM knows of each.
        start: Prompt position of the chunk's first row.
        count: Rows of the chunk.
        maps: Importance of each image, once they are scored.
    """

    index: int
    policy: VisualPolicy
    images: Sequence[ImagePlan]
    features: Sequence[MultiModalFeatureSpec]
    start: int
    count: int
    maps: list[ImageMap] = field(default_factory=list)

    @classmethod
    def of(
        cls, index: int, request: PrunedRequest, start: int, count: int, scorer: ImageScorer
    ) -> ImagedRequest:
        """Return the request's images among the `count` rows from position `start` on."""
        visual, policy = request.plan.visual, request.plan.pruning.policy("visual")
        assert visual is not None
        assert isinstance(policy, VisualPolicy)
        end = start + count
        images = [i for i in visual.images if start <= i.start < end]
        assert all(i.end <= end for i in images), "the scheduler must not cut an image in two"
        known = scorer.features_of(request.request_id)
        return cls(index, policy, images, [known[i.start] for i in images], start, count)

    def score(self, scorer: ImageScorer) -> None:
        """Get the map of every image."""
        self.maps = [scorer.map_of(feature, self.policy) for feature in self.features]

    def choose(self, hidden: Tensor, num_stages: int) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Choose from every image.

        Args:
            hidden: `[count, C]` the chunk's rows before the first layer.
            num_stages: Stages of the engine.

        Returns:
            Per stage the kept rows of the chunk, ascending; and what the images' rows become at
            the first stage, by the place of their first row among its rows.
        """
        device = hidden.device
        parts: list[list[Tensor]] = [[] for _ in range(num_stages)]
        replaced = {}
        done = placed = 0
        for image, found in zip(self.images, self.maps, strict=True):
            begin, end = image.start - self.start, image.end - self.start
            stages, features = self.policy.select_image(
                ImageInputs(
                    kept=image.kept,
                    features=hidden[begin:end],
                    importance=found.importance,
                    grids=found.grids,
                    is_video=found.is_video,
                )
            )
            text = torch.arange(done, begin, device=device)
            for part, kept in zip(parts, stages, strict=True):
                part += [text, kept + begin]
            placed += begin - done
            replaced[placed] = features
            placed += len(features)
            done = end
        rest = torch.arange(done, self.count, device=device)
        return [torch.cat([*part, rest]) for part in parts], replaced
