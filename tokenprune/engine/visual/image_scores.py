"""Scores images in the vision tower, and keeps the scores beside vLLM's encoder outputs.

An image that a request wants scored is encoded here, eagerly and by itself, before vLLM would do
it in the same step: vLLM then finds its output in the encoder cache. Hooks on the tower keep the
last executed layer's queries and keys, and the pixels; so a tower's other runs cost nothing, and
replayed CUDA graphs of the encoder, which call no hooks, are not in the way.

What the hooks kept stays as long as the output and is about as large, so every further map of the
image, whatever its parameters, costs no run of the tower. The scheduler budgets one run an image;
the one run beyond it is that of an image which was encoded for somebody who wanted no scores.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group, tensor_model_parallel_all_gather
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.multimodal.utils import group_and_batch_mm_kwargs
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache

from tokenprune.engine.families.base import ImageScores, Picture, Tower
from tokenprune.engine.guard import PolicyGuard, checked
from tokenprune.engine.stats import WorkerStats
from tokenprune.figures import Op
from tokenprune.policies import CropInputs, ImagePolicy

# scores of one image with different parameters; each is four bytes a token
MAX_SCORES = 8


@dataclass(frozen=True, slots=True)
class Scorable:
    """What maps of one image are made from.

    Attributes:
        crops: What the tower showed of each crop.
        lay_out: Turns scores `[crops, N]` into those of the image's features.
    """

    crops: list[CropInputs]
    lay_out: Callable[[Tensor], ImageScores]


class ScoredEncoderCache(EncoderCache):
    """vLLM's encoder cache with the scores of its images, which live as long as its outputs.

    Attributes:
        scorable: Per image hash what its scores are made from.
        scores: Per image hash its scores, by `ImagePolicy.score_key`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scorable: dict[str, Scorable] = {}
        self.scores: dict[str, dict[Hashable, ImageScores]] = {}

    def reset_encoder_cache(self) -> None:
        """Forget all outputs and scores."""
        super().reset_encoder_cache()
        self.scorable.clear()
        self.scores.clear()

    def free_encoder_cache(self, mm_hash: str) -> None:
        """Forget one image's output and scores."""
        super().free_encoder_cache(mm_hash)
        self.scorable.pop(mm_hash, None)
        self.scores.pop(mm_hash, None)


class ImageScorer:
    """Scores the images of one model.

    Args:
        model: The model.
        tower: Its vision tower.
        cache: Where outputs and scores are kept.
        device: The worker's device.
        stats: Where scoring is timed.
    """

    def __init__(
        self,
        model: Any,
        tower: Tower,
        cache: ScoredEncoderCache,
        device: torch.device,
        stats: WorkerStats,
    ) -> None:
        self._model = model
        self._tower = tower
        self._cache = cache
        self._device = device
        self._stats = stats
        self._guard = PolicyGuard(stats)
        # of the image that is being encoded for its scores, if any
        self._crops: list[CropInputs] | None = None
        self._picture = Picture("image", {})
        self._tower_args: Any = ()
        tower.module.register_forward_pre_hook(self._capture_pixels)
        tower.attention.register_forward_pre_hook(self._capture_attention, with_kwargs=True)

    def features_of(self, request_id: str) -> dict[int, MultiModalFeatureSpec]:
        """Return the images and videos of a request by the position of their first token."""
        found = {}
        for feature in self._cache.mm_features[request_id]:
            for first, _ in feature.mm_position.extract_embeds_range():
                found[int(first)] = feature
        return found

    def scores_of(self, feature: MultiModalFeatureSpec, policy: ImagePolicy) -> ImageScores:
        """Return an image's scores, encoding the image if it never was for its scores."""
        key, image = policy.score_key(), feature.identifier
        found = self._cache.scores.get(image, {}).get(key)
        if found is None:
            if image not in self._cache.scorable:
                self._cache.scorable[image] = self._encode(feature)
            found = self._scored(self._cache.scorable[image], policy)
            known = self._cache.scores.setdefault(image, {})
            if len(known) >= MAX_SCORES:
                del known[next(iter(known))]
            known[key] = found
        return found

    def _encode(self, feature: MultiModalFeatureSpec) -> Scorable:
        assert feature.data is not None, "the scheduler sends images whole"
        batches = group_and_batch_mm_kwargs(
            [(feature.modality, feature.data)], device=self._device, pin_memory=PIN_MEMORY
        )
        ((_, _, inputs),) = batches
        crops: list[CropInputs] = []
        picture = Picture(feature.modality, inputs)
        self._crops, self._picture = crops, picture
        try:
            (output,) = self._model.embed_multimodal(**inputs)
        finally:
            self._crops, self._tower_args = None, ()
            self._picture = Picture("image", {})

        num_tokens = output.shape[-2]

        def lay_out(scores: Tensor) -> ImageScores:
            found = self._tower.lay_out(scores, picture)
            if len(found.importance) != num_tokens:
                raise RuntimeError(
                    f"scores of an image must have a value for each of its {num_tokens} tokens, "
                    f"got {len(found.importance)}; please report this model"
                )
            return found

        # an output that is in use already stays as it is
        self._cache.encoder_outputs.setdefault(feature.identifier, output)
        return Scorable(crops, lay_out)

    def _capture_pixels(self, tower: nn.Module, args: Any) -> None:
        if self._crops is not None:
            self._tower_args = args

    def _capture_attention(self, attention: nn.Module, args: Any, kwargs: Any) -> None:
        if self._crops is None:
            return
        query, key = self._tower.heads(args, kwargs, self._picture)
        if get_tp_group().world_size > 1:
            # key patches are those of all heads together
            query, key = (
                tensor_model_parallel_all_gather(x.contiguous(), dim=1) for x in (query, key)
            )
        # copies, where the tower's own buffer would be kept alive with more in it
        query, key = query.contiguous(), key.contiguous()
        self._crops += [
            CropInputs(
                query=query[crop],
                key=key[crop],
                scale=self._tower.scale,
                pixels=partial(self._tower.pixels, self._tower_args, crop, self._picture),
                patch=self._tower.patch,
            )
            for crop in range(len(query))
        ]

    def _scored(self, image: Scorable, policy: ImagePolicy) -> ImageScores:
        with self._stats.time(Op.IMAGE_IMPORTANCE):
            scores = [self._score(policy, crop) for crop in image.crops]
        return image.lay_out(torch.stack(scores))

    def _score(self, policy: ImagePolicy, inputs: CropInputs) -> Tensor:
        shape = inputs.query.shape[1:2]
        return self._guard.ask(
            policy,
            lambda: checked(policy.score_crop(inputs), tuple(shape)).float(),
            # no patch is more important than another
            lambda: inputs.query.new_zeros(shape, dtype=torch.float32),
        )
