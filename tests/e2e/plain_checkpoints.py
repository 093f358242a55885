"""Tiny random checkpoints of models whose decoder and image tokens are plain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.e2e.other_checkpoints import decoder_config, randomize

_SIZE = 96
_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
# InternVL's processor asks the tokenizer for these by name
_NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def build_plain(name: str, tokenizer_of: Path, path: Path) -> Path:
    """Write a model by the name of its kind, with the tokenizer of another checkpoint."""
    import transformers

    extra = _NAMED_TOKENS if name == "internvl" else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_of, extra_special_tokens=extra)
    config, processor, model_class = _MAKERS[name](tokenizer)
    processor.save_pretrained(path)
    tokenizer.save_pretrained(path)
    model = getattr(transformers, model_class)(config)
    randomize(model, tokenizer.all_special_ids)
    model.save_pretrained(path)
    return path


def _ids(tokenizer: Any, *tokens: str) -> list[int]:
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer.convert_tokens_to_ids(list(tokens))


def _mistral3(tokenizer: Any) -> tuple[Any, Any, str]:
    from transformers import (
        Mistral3Config,
        MistralConfig,
        PixtralImageProcessor,
        PixtralProcessor,
        PixtralVisionConfig,
    )

    image, _, _ = _ids(tokenizer, "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    vision = PixtralVisionConfig(**_TOWER, head_dim=32, image_size=_SIZE, patch_size=8)
    config = Mistral3Config(
        text_config=MistralConfig(**decoder_config(tokenizer), sliding_window=None),
        vision_config=vision,
        image_token_index=image,
        spatial_merge_size=2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        dtype="float32",
    )
    images = PixtralImageProcessor(
        size={"longest_edge": _SIZE}, patch_size={"height": 8, "width": 8}
    )
    processor = PixtralProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        spatial_merge_size=2,
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    )
    return config, processor, "Mistral3ForConditionalGeneration"


def _idefics3(tokenizer: Any) -> tuple[Any, Any, str]:
    from transformers import Idefics3Config, Idefics3ImageProcessor, Idefics3Processor

    image, *_ = _ids(
        tokenizer,
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        "<end_of_utterance>",
        *(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)),
    )
    config = Idefics3Config(
        text_config={"model_type": "llama", **decoder_config(tokenizer)},
        vision_config={**_TOWER, "image_size": 48, "patch_size": 8},
        image_token_id=image,
        scale_factor=2,
        tie_word_embeddings=False,
        dtype="float32",
    )
    images = Idefics3ImageProcessor(
        size={"longest_edge": _SIZE}, max_image_size={"longest_edge": 48}
    )
    processor = Idefics3Processor(image_processor=images, tokenizer=tokenizer, image_seq_len=9)
    return config, processor, "Idefics3ForConditionalGeneration"


def _internvl(tokenizer: Any) -> tuple[Any, Any, str]:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    image = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **decoder_config(tokenizer)},
        vision_config={**_TOWER, "image_size": [48, 48], "patch_size": [8, 8]},
        image_token_id=image,
        image_seq_length=9,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
        dtype="float32",
    )
    sized = {"size": {"height": 48, "width": 48}}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            crop_to_patches=True, min_patches=1, max_patches=4, **sized
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(**sized),
        image_seq_length=9,
    )
    return config, processor, "InternVLForConditionalGeneration"


_MAKERS: dict[str, Callable[[Any], tuple[Any, Any, str]]] = {
    "mistral3": _mistral3,
    "idefics3": _idefics3,
    "internvl": _internvl,
}
