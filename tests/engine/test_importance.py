"""The map of an image lies as its features do, and leaves the cache with them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("vllm", reason="needs vLLM")

from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration

from tokenprune.engine import importance
from tokenprune.engine.importance import (
    ImageMap,
    ImageScorer,
    ScoredEncoderCache,
    _tiled_map,
    _video_map,
)

SIDE, PATCH = 6, 4
MODELS = {
    "llava_next": LlavaNextForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
}


def config_of(model_type, most):
    size = SIDE * PATCH
    return SimpleNamespace(
        model_type=model_type,
        image_grid_pinpoints=[[r * size, c * size] for r in range(1, most) for c in range(1, most)],
        vision_config=SimpleNamespace(image_size=size, patch_size=PATCH),
    )


def num_crops(config, size):
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return image_size_to_num_patches(
        size, config.image_grid_pinpoints, config.vision_config.image_size
    )


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize(
    "size",
    [
        pytest.param([48, 48], id="square"),
        pytest.param([30, 70], id="wide"),
        pytest.param([70, 30], id="tall"),
        pytest.param([22, 95], id="one-row-of-tiles"),
        pytest.param([96, 96], id="sixteen-tiles"),
        pytest.param([90, 60], id="many-tiles-unpadded"),
    ],
)
def test_a_tiled_map_lies_as_vllm_lays_out_features(model_type, size):
    config = config_of(model_type, 5)
    crops = num_crops(config, size)
    assert crops > 1
    scores = torch.rand(crops, SIDE**2, generator=torch.Generator().manual_seed(4))
    newline = torch.tensor([torch.inf])
    model = SimpleNamespace(config=config, image_newline=newline)
    extra = {"image_newline": newline} if model_type == "llava_onevision" else {}
    expected = MODELS[model_type]._merge_image_patch_embeddings(
        model, torch.tensor(size), scores[..., None], strategy="spatial_unpad", **extra
    )[:, 0]
    found = _tiled_map(scores, SIDE, size, config)
    torch.testing.assert_close(found.importance, expected)
    (base, width), (rest, tile_width) = found.grids
    assert (base, width) == (SIDE**2, SIDE)
    # a line break ends each row of the tiles
    rows = found.importance[base:].view(-1, tile_width)
    assert rows.numel() == rest
    assert rows.isinf().all(dim=0).tolist() == [False] * (tile_width - 1) + [True]
    resized = rest < 0.8 * crops * SIDE**2 and size == [96, 96]
    assert resized == (model_type == "llava_onevision" and size == [96, 96])


@pytest.mark.parametrize("model_type", MODELS)
def test_an_image_of_one_crop_ends_with_a_line_break(model_type):
    scores = torch.rand(1, SIDE**2)
    found = _tiled_map(scores, SIDE, [24, 24], config_of(model_type, 3))
    assert found.importance[:-1].tolist() == scores[0].tolist()
    assert math.isinf(found.importance[-1])
    assert found.grids == ((SIDE**2, SIDE), (1, 1))


@pytest.mark.parametrize("side", [6, 7])
def test_the_map_of_a_video_is_pooled_as_its_frames_are(side):
    scores = torch.rand(5, side**2, generator=torch.Generator().manual_seed(4))
    model = SimpleNamespace(
        config=SimpleNamespace(
            vision_config=SimpleNamespace(image_size=side * PATCH, patch_size=PATCH)
        )
    )
    expected = LlavaOnevisionForConditionalGeneration.apply_pooling(model, scores[..., None])
    found = _video_map(scores, side)
    assert found.is_video
    torch.testing.assert_close(found.importance[:-1], expected.flatten())
    assert math.isinf(found.importance[-1])
    assert found.grids == ((5 * math.ceil(side / 2) ** 2, math.ceil(side / 2)), (1, 1))


def test_outputs_and_maps_leave_the_cache_together():
    cache, found = ScoredEncoderCache(), ImageMap(torch.ones(1), ((1, 1),), False)
    for name in ("a", "b"):
        cache.encoder_outputs[name] = torch.ones(1, 1)
        cache.maps[name] = {(): found}
    cache.free_encoder_cache("a")
    assert set(cache.maps) == set(cache.encoder_outputs) == {"b"}
    cache.free_encoder_cache("never there")
    cache.reset_encoder_cache()
    assert not cache.maps
    assert not cache.encoder_outputs


class Policy(SimpleNamespace):
    def score_key(self):
        return self.key


def test_an_image_has_at_most_so_many_maps_and_the_oldest_goes_first(monkeypatch):
    scorer = object.__new__(ImageScorer)
    scorer._cache = ScoredEncoderCache()
    encoded = []

    def encode(self, feature, policy):
        encoded.append(policy.key)
        return ImageMap(torch.ones(1), ((1, 1),), False)

    monkeypatch.setattr(ImageScorer, "_encode", encode)
    feature = SimpleNamespace(identifier="a")
    for key in range(importance.MAX_MAPS + 1):
        scorer.map_of(feature, Policy(key=key))
        scorer.map_of(feature, Policy(key=key))
    assert encoded == list(range(importance.MAX_MAPS + 1))
    assert list(scorer._cache.maps["a"]) == encoded[1:]


@pytest.mark.parametrize("normalises", [True, False])
def test_raw_pixels_are_those_before_the_processor(monkeypatch, normalises):
    from transformers import CLIPImageProcessor

    raw = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    images = CLIPImageProcessor(
        size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
        do_normalize=normalises,
        do_rescale=normalises,
    )
    scorer = object.__new__(ImageScorer)
    scorer._model_config, scorer._modality = None, "image"
    scorer._pixels = images(Image.fromarray(raw), return_tensors="pt")["pixel_values"]
    processor = SimpleNamespace(image_processor=images)
    monkeypatch.setattr(importance, "cached_processor_from_config", lambda config: processor)
    assert np.array_equal(scorer._raw_pixels(0).permute(1, 2, 0).numpy(), raw)
    scorer._pixels = scorer._pixels.bfloat16()
    back = scorer._raw_pixels(0).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(back - raw).max() <= 1
