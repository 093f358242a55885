"""Scores images in the vision tower, and keeps the scores beside vLLM's encoder outputs.

An image that a request wants scored is encoded here, eagerly and by itself, before vLLM would do
it in the same step: vLLM then finds its output in the encoder cache. Hooks on the tower hand the
last executed layer's queries and keys, and the pixels, to the policy; so a tower's other runs cost
nothing, and replayed CUDA graphs of the encoder, which call no hooks, are not in the way. An image
whose output is cached without the scores asked for is encoded once more.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group, tensor_model_parallel_all_gather
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.multimodal.utils import group_and_batch_mm_kwargs
from vllm.transformers_utils.processor import cached_processor_from_config
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache

from tokenprune.engine.stats import WorkerStats
from tokenprune.figures import Op
from tokenprune.policies import CropInputs, VisualPolicy

# maps of one image with different parameters; each is four bytes a token
MAX_MAPS = 8
# vLLM pools the frames of a video, and resizes tiles beyond this many crops, by these constants
VIDEO_STRIDE = 2
MAX_CROPS = 9


@dataclass(frozen=True, slots=True)
class ImageMap:
    """The importance of one image's tokens, laid out as its features are.

    Attributes:
        importance: `[N]` float32; infinite for tokens that separate rows.
        grids: `(tokens, width)` of the grids of tokens behind each other.
        is_video: Whether these are the frames of a video.
    """

    importance: Tensor
    grids: tuple[tuple[int, int], ...]
    is_video: bool


class ScoredEncoderCache(EncoderCache):
    """vLLM's encoder cache with the maps of its images, which live as long as its outputs.

    Attributes:
        maps: Per image hash its maps, by `VisualPolicy.score_key`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps: dict[str, dict[Hashable, ImageMap]] = {}

    def reset_encoder_cache(self) -> None:
        """Forget all outputs and maps."""
        super().reset_encoder_cache()
        self.maps.clear()

    def free_encoder_cache(self, mm_hash: str) -> None:
        """Forget one image's output and maps."""
        super().free_encoder_cache(mm_hash)
        self.maps.pop(mm_hash, None)


class ImageScorer:
    """Scores the images of one model.

    Args:
        vllm_config: vLLM's settings.
        model: A LLaVA-type model with a CLIP or SigLIP tower.
        cache: Where outputs and maps are kept.
        device: The worker's device.
        stats: Where scoring is timed.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: Any,
        cache: ScoredEncoderCache,
        device: torch.device,
        stats: WorkerStats,
    ) -> None:
        self._model_config = vllm_config.model_config
        self._config = vllm_config.model_config.hf_config
        self._model = model
        self._cache = cache
        self._device = device
        self._stats = stats
        vision = self._config.vision_config
        self._patch = int(vision.patch_size)
        self._side = int(vision.image_size) // self._patch
        self._policy: VisualPolicy | None = None
        self._modality = "image"
        self._pixels: Tensor | None = None
        self._scores: list[Tensor] = []
        tower = model.vision_tower
        tower.register_forward_pre_hook(self._see_pixels)
        # the tower is built up to the layer whose output is used
        last = tower.vision_model.encoder.layers[-1].self_attn.attn
        last.register_forward_pre_hook(self._see_attention)

    def features_of(self, request_id: str) -> dict[int, MultiModalFeatureSpec]:
        """Return the images and videos of a request by the position of their first token."""
        found = {}
        for feature in self._cache.mm_features[request_id]:
            for first, _ in feature.mm_position.extract_embeds_range():
                found[int(first)] = feature
        return found

    def map_of(self, feature: MultiModalFeatureSpec, policy: VisualPolicy) -> ImageMap:
        """Return an image's map, encoding the image if there is none."""
        key = policy.score_key()
        found = self._cache.maps.get(feature.identifier, {}).get(key)
        if found is None:
            found = self._encode(feature, policy)
            # after encoding: a failure leaves nothing behind
            maps = self._cache.maps.setdefault(feature.identifier, {})
            if len(maps) >= MAX_MAPS:
                del maps[next(iter(maps))]
            maps[key] = found
        return found

    def _encode(self, feature: MultiModalFeatureSpec, policy: VisualPolicy) -> ImageMap:
        assert feature.data is not None, "the scheduler sends images whole"
        batches = group_and_batch_mm_kwargs(
            [(feature.modality, feature.data)], device=self._device, pin_memory=PIN_MEMORY
        )
        ((_, _, inputs),) = batches
        self._policy, self._modality, self._scores = policy, feature.modality, []
        try:
            (output,) = self._model.embed_multimodal(**inputs)
        finally:
            self._policy = self._pixels = None
        # an output that is in use already stays as it is
        self._cache.encoder_outputs.setdefault(feature.identifier, output)
        scores, self._scores = torch.stack(self._scores), []
        if feature.modality == "video":
            found = _video_map(scores, self._side)
        elif "image_sizes" in inputs:
            found = _tiled_map(scores, self._side, inputs["image_sizes"][0].tolist(), self._config)
        else:
            found = ImageMap(scores[0], ((scores.shape[1], self._side),), False)
        if len(found.importance) != output.shape[-2]:
            raise RuntimeError(
                f"the map of an image must have a value for each of its {output.shape[-2]} "
                f"tokens, got {len(found.importance)}; please report this model"
            )
        return found

    def _see_pixels(self, tower: nn.Module, args: Any) -> None:
        if self._policy is not None:
            self._pixels = args[0]

    def _see_attention(self, attn: Any, args: Any) -> None:
        policy = self._policy
        if policy is None:
            return
        query, key = args[0], args[1]
        heads, tp = attn.num_heads, get_tp_group().world_size
        if tp > 1:
            # key patches are those of all heads together
            query, key = (tensor_model_parallel_all_gather(x.contiguous()) for x in (query, key))
            heads *= tp
        # a class token stands in front
        patches = slice(query.shape[1] - self._side**2, None)
        query, key = (
            x[:, patches].unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key)
        )
        with self._stats.time(Op.IMAGE_IMPORTANCE):
            for i in range(len(query)):
                self._scores.append(
                    policy.score_crop(
                        CropInputs(
                            query=query[i],
                            key=key[i],
                            scale=float(attn.scale),
                            pixels=partial(self._raw_pixels, i),
                            patch=self._patch,
                        )
                    )
                )

    def _raw_pixels(self, crop: int) -> Tensor:
        """Undo the processor's normalisation; in bfloat16 values come back to about one level."""
        assert self._pixels is not None
        processor: Any = cached_processor_from_config(self._model_config)
        video = self._modality == "video"
        images = processor.video_processor if video else processor.image_processor
        pixels = self._pixels[crop].float()
        if images.do_normalize:
            mean, std = (
                torch.tensor(x, device=pixels.device)[:, None, None]
                for x in (images.image_mean, images.image_std)
            )
            pixels = pixels * std + mean
        if images.do_rescale:
            pixels = pixels / images.rescale_factor
        return pixels.round().clamp(0, 255).to(torch.uint8)


def _tiled_map(scores: Tensor, side: int, size: list[int], config: Any) -> ImageMap:
    """Lay scores `[crops, side * side]` out as LLaVA-NeXT and OneVision lay out features."""
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
        unpad_image,
    )

    base = scores[0]
    if len(scores) == 1:
        newline = base.new_full((1,), math.inf)
        return ImageMap(torch.cat([base, newline]), ((len(base), side), (1, 1)), False)
    rows, columns = get_anyres_image_grid_shape(
        tuple(size), config.image_grid_pinpoints, config.vision_config.image_size
    )
    tiles = scores[1 : 1 + rows * columns].view(rows, columns, side, side)
    tiles = tiles.transpose(1, 2).reshape(1, rows * side, columns * side)
    tiles = unpad_image(tiles, tuple(size))
    height, width = tiles.shape[1:]
    ratio = math.sqrt(height * width / (MAX_CROPS * side**2))
    if config.model_type == "llava_onevision" and ratio > 1.1:
        tiles = nn.functional.interpolate(
            tiles[None], [int(height // ratio), int(width // ratio)], mode="bilinear"
        )[0]
    # a line break behind each row
    tiles = nn.functional.pad(tiles[0], (0, 1), value=math.inf)
    grids = ((len(base), side), (tiles.numel(), tiles.shape[1]))
    return ImageMap(torch.cat([base, tiles.flatten()]), grids, False)


def _video_map(scores: Tensor, side: int) -> ImageMap:
    """Lay scores `[frames, side * side]` out as LLaVA-OneVision lays out frames."""
    pooled = math.ceil(side / VIDEO_STRIDE)
    frames = nn.functional.interpolate(
        scores.view(-1, 1, side, side), size=[pooled, pooled], mode="bilinear"
    )
    newline = scores.new_full((1,), math.inf)
    grids = ((frames.numel(), pooled), (1, 1))
    return ImageMap(torch.cat([frames.flatten(), newline]), grids, True)
