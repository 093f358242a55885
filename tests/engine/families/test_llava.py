"""Scores of an image lie as its features do; pixels are those before the processor."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("vllm", reason="needs vLLM")

from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration

from tokenprune.engine.families.base import Picture
from tokenprune.engine.families.llava import LlavaTower, _tiled_scores, _video_scores

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
def test_tiled_scores_lie_as_vllm_lays_out_features(model_type, size):
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
    found = _tiled_scores(scores, SIDE, size, config)
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
    found = _tiled_scores(scores, SIDE, [24, 24], config_of(model_type, 3))
    assert found.importance[:-1].tolist() == scores[0].tolist()
    assert math.isinf(found.importance[-1])
    assert found.grids == ((SIDE**2, SIDE), (1, 1))


@pytest.mark.parametrize("side", [6, 7])
def test_scores_of_a_video_are_pooled_as_its_frames_are(side):
    scores = torch.rand(5, side**2, generator=torch.Generator().manual_seed(4))
    model = SimpleNamespace(
        config=SimpleNamespace(
            vision_config=SimpleNamespace(image_size=side * PATCH, patch_size=PATCH)
        )
    )
    expected = LlavaOnevisionForConditionalGeneration.apply_pooling(model, scores[..., None])
    found = _video_scores(scores, side)
    assert found.is_video
    torch.testing.assert_close(found.importance[:-1], expected.flatten())
    assert math.isinf(found.importance[-1])
    assert found.grids == ((5 * math.ceil(side / 2) ** 2, math.ceil(side / 2)), (1, 1))


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
    tower = object.__new__(LlavaTower)
    multimodal = SimpleNamespace(mm_device_do_normalize=False)
    tower._model_config = SimpleNamespace(multimodal_config=multimodal)
    args = (images(Image.fromarray(raw), return_tensors="pt")["pixel_values"],)
    processor = SimpleNamespace(image_processor=images)
    monkeypatch.setattr(
        "vllm.transformers_utils.processor.cached_processor_from_config", lambda config: processor
    )
    picture = Picture("image", {})
    assert np.array_equal(tower.pixels(args, 0, picture).permute(1, 2, 0).numpy(), raw)
    back = tower.pixels((args[0].bfloat16(),), 0, picture).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(back - raw).max() <= 1
