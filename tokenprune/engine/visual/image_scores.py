"""Scores images in the vision tower, and keeps the scores beside vLLM's encoder outputs.

An image that a request wants scored is encoded here, eagerly and by itself, before vLLM would do
it in the same step: vLLM then finds its output in the encoder cache. Hooks on the tower hand the
last executed layer's queries and keys, and the pixels, to the policy; so a tower's other runs cost
nothing, and replayed CUDA graphs of the encoder, which call no hooks, are not in the way. An image
whose output is cached without the scores asked for is encoded once more.
"""

from __future__ import annotations

from collections.abc import Hashable
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


class ScoredEncoderCache(EncoderCache):
    """vLLM's encoder cache with the scores of its images, which live as long as its outputs.

    Attributes:
        scores: Per image hash its scores, by `ImagePolicy.score_key`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores: dict[str, dict[Hashable, ImageScores]] = {}

    def reset_encoder_cache(self) -> None:
        """Forget all outputs and scores."""
        super().reset_encoder_cache()
        self.scores.clear()

    def free_encoder_cache(self, mm_hash: str) -> None:
        """Forget one image's output and scores."""
        super().free_encoder_cache(mm_hash)
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
        self._policy: ImagePolicy | None = None
        self._picture = Picture("image", {})
        self._tower_args: Any = ()
        self._scores: list[Tensor] = []
        tower.module.register_forward_pre_hook(self._capture_pixels)
        tower.attention.register_forward_pre_hook(self._score_attention, with_kwargs=True)

    def features_of(self, request_id: str) -> dict[int, MultiModalFeatureSpec]:
        """Return the images and videos of a request by the position of their first token."""
        found = {}
        for feature in self._cache.mm_features[request_id]:
            for first, _ in feature.mm_position.extract_embeds_range():
                found[int(first)] = feature
        return found

    def scores_of(self, feature: MultiModalFeatureSpec, policy: ImagePolicy) -> ImageScores:
        """Return an image's scores, encoding the image if there are none."""
        key = policy.score_key()
        found = self._cache.scores.get(feature.identifier, {}).get(key)
        if found is None:
            found = self._encode(feature, policy)
            # after encoding: a failure leaves nothing in the cache
            known = self._cache.scores.setdefault(feature.identifier, {})
            if len(known) >= MAX_SCORES:
                del known[next(iter(known))]
            known[key] = found
        return found

    def _encode(self, feature: MultiModalFeatureSpec, policy: ImagePolicy) -> ImageScores:
        assert feature.data is not None, "the scheduler sends images whole"
        batches = group_and_batch_mm_kwargs(
            [(feature.modality, feature.data)], device=self._device, pin_memory=PIN_MEMORY
        )
        ((_, _, inputs),) = batches
        self._policy, self._scores = policy, []
        self._picture = Picture(feature.modality, inputs)
        try:
            (output,) = self._model.embed_multimodal(**inputs)
        finally:
            picture, self._picture = self._picture, Picture("image", {})
            self._policy, self._tower_args = None, ()
        # an output that is in use already stays as it is
        self._cache.encoder_outputs.setdefault(feature.identifier, output)
        scores, self._scores = torch.stack(self._scores), []
        found = self._tower.lay_out(scores, picture)
        if len(found.importance) != output.shape[-2]:
            raise RuntimeError(
                f"scores of an image must have a value for each of its {output.shape[-2]} "
                f"tokens, got {len(found.importance)}; please report this model"
            )
        return found

    def _capture_pixels(self, tower: nn.Module, args: Any) -> None:
        if self._policy is not None:
            self._tower_args = args

    def _score_attention(self, attention: nn.Module, args: Any, kwargs: Any) -> None:
        policy = self._policy
        if policy is None:
            return
        query, key = self._tower.heads(args, kwargs, self._picture)
        if get_tp_group().world_size > 1:
            # key patches are those of all heads together
            query, key = (
                tensor_model_parallel_all_gather(x.contiguous(), dim=1) for x in (query, key)
            )
        with self._stats.time(Op.IMAGE_IMPORTANCE):
            for crop in range(len(query)):
                inputs = CropInputs(
                    query=query[crop],
                    key=key[crop],
                    scale=self._tower.scale,
                    pixels=partial(self._tower.pixels, self._tower_args, crop, self._picture),
                    patch=self._tower.patch,
                )
                self._scores.append(self._score(policy, inputs))

    def _score(self, policy: ImagePolicy, inputs: CropInputs) -> Tensor:
        shape = inputs.query.shape[1:2]
        return self._guard.ask(
            policy,
            lambda: checked(policy.score_crop(inputs), tuple(shape)).float(),
            # no patch is more important than another
            lambda: inputs.query.new_zeros(shape, dtype=torch.float32),
        )
