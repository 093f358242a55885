"""Towers of Qwen-VL that cannot be scored say so, and patches come back as pixels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("vllm", reason="needs vLLM")

from tokenprune.engine.families.base import Picture
from tokenprune.engine.families.qwen_vl import QwenTower, QwenVL


def config_of(*, compiled=False, **vision):
    vision = {"model_type": "qwen2_5_vl_vision", "depth": 4} | vision
    hf_config = SimpleNamespace(vision_config=SimpleNamespace(**vision))
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config),
        compilation_config=SimpleNamespace(compile_mm_encoder=compiled),
    )


def test_towers_are_scored_whose_last_layer_sees_the_whole_image():
    for config in (
        config_of(fullatt_block_indexes=[1, 3]),
        config_of(model_type="qwen3_vl_vision"),
    ):
        assert QwenVL().importance_unsupported(config) is None
    for config, reason in (
        (config_of(fullatt_block_indexes=[0, 1]), "within windows in the last layer"),
        (config_of(fullatt_block_indexes=[3], compiled=True), "is compiled"),
        (config_of(model_type="clip_vision_model"), "'clip_vision_model' is not among qwen2_vl"),
    ):
        assert reason in QwenVL().importance_unsupported(config)


@pytest.mark.parametrize("on_device", [True, False])
def test_pixels_are_those_before_the_processor(monkeypatch, on_device):
    from transformers import Qwen2VLImageProcessor

    raw = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    size = {"shortest_edge": 16, "longest_edge": 64 * 64}
    images = Qwen2VLImageProcessor(
        patch_size=8, size=size, do_normalize=not on_device, do_rescale=not on_device
    )
    inputs = images(Image.fromarray(raw), return_tensors="pt")
    tower = object.__new__(QwenTower)
    tower.patch, tower._side, tower._frames = 8, 2, 2
    multimodal = SimpleNamespace(mm_device_do_normalize=on_device)
    tower._model_config = SimpleNamespace(multimodal_config=multimodal)
    monkeypatch.setattr(
        "vllm.transformers_utils.processor.cached_processor_from_config",
        lambda config: SimpleNamespace(image_processor=images),
    )
    found = tower.pixels((inputs["pixel_values"],), 0, Picture("image", inputs))
    assert found.dtype == torch.uint8
    assert np.array_equal(found.permute(1, 2, 0).numpy(), raw)


def test_a_token_is_as_important_as_its_four_patches():
    tower = object.__new__(QwenTower)
    tower._side = 2
    scores = torch.arange(16.0).view(1, 16)
    picture = Picture("image", {"image_grid_thw": torch.tensor([[1, 2, 8]])})
    found = tower.lay_out(scores, picture)
    assert found.importance.tolist() == [4.5, 6.5, 8.5, 10.5]
    assert found.grids == ((4, 4),)
    assert not found.is_video
