"""Tiny random checkpoints of other models than the built-in LLaVA."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_POSITIONS = 4096
_VIDEO_PROCESSORS = {
    "Qwen2VL": "Qwen2VLVideoProcessor",
    "Qwen2_5_VL": "Qwen2VLVideoProcessor",
    "Qwen3VL": "Qwen3VLVideoProcessor",
}


def build(name: str, tokenizer_of: Path, path: Path) -> Path:
    """Write a Qwen-VL or another kind named below, with the tokenizer of another checkpoint."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_of)
    classes = {
        "qwen2_vl": "Qwen2VL",
        "qwen2_5_vl": "Qwen2_5_VL",
        "qwen3_vl": "Qwen3VL",
        "qwen3_vl_moe": "Qwen3VLMoe",
    }
    if name in classes:
        tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL)})
        tokenizer.image_token, tokenizer.video_token = _SPECIAL[2:]
        config = _vision_language_config(name, tokenizer)
        _processor(classes[name].removesuffix("Moe"), config, tokenizer).save_pretrained(path)
        model_class = f"{classes[name]}ForConditionalGeneration"
    elif name == "deepseek_v3":
        config = transformers.DeepseekV3Config(**_latent_decoder(tokenizer))
        model_class = "DeepseekV3ForCausalLM"
    elif name == "qwen3_5":
        config = transformers.Qwen3_5TextConfig(**_hybrid_decoder(tokenizer))
        model_class = "Qwen3_5ForCausalLM"
    else:
        config = transformers.LlamaConfig(
            **decoder_config(tokenizer), tie_word_embeddings=False, dtype="float32"
        )
        model_class = "LlamaForCausalLM"
    tokenizer.save_pretrained(path)
    model = getattr(transformers, model_class)(config)
    randomize(model, tokenizer.all_special_ids)
    model.save_pretrained(path)
    if name == "qwen3_vl_moe":
        _publish_experts(path)
    return path


def served(path: Path) -> Path:
    """Return where vLLM finds what transformers finds at `path`."""
    published = path / "published"
    return published if published.exists() else path


def _publish_experts(path: Path) -> None:
    """Write a copy with the experts as published, `[E, in, out]`; transformers has them turned."""
    from safetensors.torch import load_file, save_file

    files = [file for file in path.iterdir() if file.is_file()]
    (path / "published").mkdir()
    for file in files:
        shutil.copy(file, path / "published")
    weights = load_file(path / "model.safetensors")
    for key in weights:
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            weights[key] = weights[key].transpose(1, 2).contiguous()
    save_file(weights, path / "published" / "model.safetensors", metadata={"format": "pt"})


def decoder_config(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": _POSITIONS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _hybrid_decoder(tokenizer: Any) -> dict[str, Any]:
    """Return a decoder of which every other layer carries a state instead of a cache."""
    return decoder_config(tokenizer) | {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def _latent_decoder(tokenizer: Any) -> dict[str, Any]:
    """Return a dense decoder whose cache holds one latent per token (MLA)."""
    plain = decoder_config(tokenizer)
    del plain["head_dim"]
    return plain | {
        "num_key_value_heads": 2,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        "v_head_dim": 32,
        "first_k_dense_replace": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


def _vision_language_config(name: str, tokenizer: Any) -> Any:
    from transformers import AutoConfig

    text, vision = decoder_config(tokenizer), {"depth": 2, "num_heads": 2, "patch_size": 8}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    if name == "qwen2_vl":
        del text["head_dim"]
        vision |= {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
    elif name == "qwen2_5_vl":
        del text["head_dim"]
        # windows of two by two merged patches in the first layer, all of the image in the last
        vision |= {
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": 64,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        }
    else:
        rope["mrope_interleaved"] = True
        if name == "qwen3_vl_moe":
            # all three sizes differ, so that turned experts do not fit
            text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
            # transformers always does, vLLM asks
            text["norm_topk_prob"] = True
        vision |= {
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": 64,
            "num_position_embeddings": 144,
            "deepstack_visual_indexes": [0, 1],
        }
    ids = tokenizer.convert_tokens_to_ids(list(_SPECIAL))
    keys = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return AutoConfig.for_model(
        name,
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=False,
        dtype="float32",
        **dict(zip(keys, ids, strict=True)),
    )


def _processor(family: str, config: Any, tokenizer: Any) -> Any:
    import transformers

    grid = {
        "patch_size": config.vision_config.patch_size,
        "temporal_patch_size": config.vision_config.temporal_patch_size,
        "merge_size": config.vision_config.spatial_merge_size,
        "size": {"shortest_edge": 16 * 16, "longest_edge": 96 * 96},
        # vLLM normalises videos by what it knows of images
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return getattr(transformers, f"{family}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(**grid),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, _VIDEO_PROCESSORS[family])(
            # of Qwen3-VL these are the pixels of all frames together
            **(grid | {"size": {"shortest_edge": 16 * 16, "longest_edge": 4 * 96 * 96}})
        ),
    )


def randomize(model: nn.Module, special: list[int]) -> None:
    """Give unit variance to every layer's output: the usual 0.02 makes all prompts look alike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                values = values * 0.1 + (not name.endswith(".bias"))
            elif "embed_tokens" not in name and "pos_embed" not in name:
                values *= 1.4 * weight[0].numel() ** -0.5
            weight.copy_(values)
        # an answer should neither stop early nor contain an image
        model.lm_head.weight[special] = 0
