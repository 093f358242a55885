"""Build a complete LLaVA-type checkpoint with random weights, without a network.

The folder loads in transformers and in vLLM. Weights carry the names of the published LLaVA
checkpoints (`vision_tower.vision_model.*`, `language_model.model.*`, ...): both libraries take
those, while vLLM does not take the names that transformers 5 writes for a CLIP tower.

Random weights answer nonsense, but their scale is chosen so that the model behaves like a trained
one where pruning looks: attention prefers some rows over others, every layer changes the residual
stream, its variance stays near one, and different prompts get clearly different logits.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from tokenprune.demo.corpus import CORPUS

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
Architecture = Literal["llava", "llava_next", "llava_onevision"]

IMAGE_TOKEN = "<image>"
_SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", IMAGE_TOKEN, "<video>"]
_MARKER = "tokenprune_checkpoint.json"
_FORMAT = 1  # raise it when the same parameters should give other bytes

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- message['role'] | upper }}: {% if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- elif part['type'] in ('image', 'image_url') -%}
{{- '<image>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'ASSISTANT:' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class CheckpointSpec:
    """Everything that decides the bytes of a checkpoint.

    Attributes:
        seed: Seed of the weights.
        layers: Decoder layers.
        hidden: Width of the decoder.
        heads: Query heads of the decoder.
        kv_heads: KV heads of the decoder.
        head_dim: Width of one head; `hidden // heads` when None.
        intermediate: Width of the decoder's MLP; about 2.75 x `hidden` when None.
        vocab: Upper bound of the vocabulary; the tokenizer may find fewer merges.
        max_positions: Longest sequence in tokens.
        image_size: Side of the square the vision tower sees, in pixels.
        patch_size: Side of one patch, in pixels.
        vision_layers: Layers of the vision tower.
        vision_hidden: Width of the vision tower.
        vision_heads: Heads of the vision tower.
        family: Type of the decoder.
        architecture: How images become tokens.
        dtype: Type of the stored weights, `float32` or `bfloat16`.
    """

    seed: int = 0
    layers: int = 8
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None
    intermediate: int | None = None
    vocab: int = 1000
    max_positions: int = 4096
    image_size: int = 96
    patch_size: int = 8
    vision_layers: int = 3
    vision_hidden: int = 64
    vision_heads: int = 2
    family: Family = "llama"
    architecture: Architecture = "llava"
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one square tile; a `llava` image is one tile."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def digest(self) -> str:
        """Name of this checkpoint among all that this code can build."""
        record = json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(record.encode()).hexdigest()


# 576 visual tokens an image, as LLaVA-1.5 has: four images are a prefill of some seconds on two
# CPU cores, long enough for pruning to show in the time to first token
DEMO = CheckpointSpec(
    layers=16,
    hidden=512,
    heads=8,
    kv_heads=4,
    image_size=336,
    patch_size=14,
    vision_layers=4,
    vision_hidden=128,
    vision_heads=4,
)


def cache_dir() -> Path:
    """Folder for built checkpoints: `$TOKENPRUNE_CACHE`, else `~/.cache/tokenprune`."""
    return Path(os.environ.get("TOKENPRUNE_CACHE") or Path.home() / ".cache" / "tokenprune")


def cached_checkpoint(spec: CheckpointSpec = DEMO) -> Path:
    """Return the folder of `spec` in the cache, building it on first use."""
    name = f"{spec.architecture}-{spec.family}-{spec.digest[:12]}"
    return build_checkpoint(cache_dir() / name, **asdict(spec))


def build_checkpoint(path: str | os.PathLike[str], **parameters: Any) -> Path:
    """Write a random LLaVA-type checkpoint, unless `path` already holds the same one.

    The folder appears in one rename, so an interrupted build leaves nothing at `path`. A folder
    there that some other call left whole with other parameters, or that lost a file, is replaced;
    a folder this function did not write is never touched.

    Args:
        path: Folder to create.
        **parameters: Fields of `CheckpointSpec`.

    Returns:
        `path`.

    Raises:
        FileExistsError: `path` exists and is not a checkpoint of this function.
    """
    target = Path(path)
    spec = CheckpointSpec(**parameters)
    if _is_whole(target, spec):
        return target
    _check_own(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write(scratch, spec)
        if target.exists() and not _is_whole(target, spec):
            shutil.rmtree(target)
        try:
            scratch.rename(target)
        except OSError:
            # two processes may build at the same time; the bytes are equal, so the first one wins
            if not _is_whole(target, spec):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _is_whole(path: Path, spec: CheckpointSpec) -> bool:
    marker = path / _MARKER
    if not marker.is_file():
        return False
    record = json.loads(marker.read_text())
    sizes: dict[str, int] = record["files"]
    return record["digest"] == spec.digest and all(
        (path / name).is_file() and (path / name).stat().st_size == size
        for name, size in sizes.items()
    )


def _check_own(path: Path) -> None:
    if path.exists() and not (path / _MARKER).is_file():
        raise FileExistsError(
            f"checkpoint folder must be new or built by tokenprune, got {path}; choose another path"
        )


def _write(path: Path, spec: CheckpointSpec) -> None:
    tokenizer = _tokenizer(spec)
    tokenizer.save_pretrained(path)
    config = _config(spec, tokenizer)
    config.save_pretrained(path)
    _processor(spec, tokenizer).save_pretrained(path)
    save_file(_weights(spec, config), path / "model.safetensors", metadata={"format": "pt"})
    # generation defaults would be guessed from the config otherwise, and vLLM samples by them
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    sizes = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
    record = {"digest": spec.digest, "files": sizes, "parameters": asdict(spec)}
    (path / _MARKER).write_text(json.dumps(record, indent=2) + "\n")
    path.chmod(0o755)  # mkdtemp makes it private


def _tokenizer(spec: CheckpointSpec) -> Any:
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": IMAGE_TOKEN, "video_token": "<video>"},
        chat_template=CHAT_TEMPLATE,
        model_max_length=spec.max_positions,
        padding_side="left",
    )


def _config(spec: CheckpointSpec, tokenizer: Any) -> Any:
    from transformers import AutoConfig

    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate or spec.hidden * 11 // 4,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim or spec.hidden // spec.heads,
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if spec.family == "mistral":
        text["sliding_window"] = None
    vision = {
        "hidden_size": spec.vision_hidden,
        "intermediate_size": spec.vision_hidden * 2,
        "num_hidden_layers": spec.vision_layers,
        "num_attention_heads": spec.vision_heads,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
    }
    fields: dict[str, Any] = {
        "text_config": {**text, "model_type": spec.family},
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "tie_word_embeddings": False,
    }
    if spec.architecture == "llava_onevision":
        fields["vision_config"] = {
            **vision,
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
        }
        fields["video_token_index"] = tokenizer.convert_tokens_to_ids("<video>")
        fields["vision_aspect_ratio"] = "anyres_max_9"
        strategy, layer = "full", -1
    else:
        fields["vision_config"] = {
            **vision,
            "model_type": "clip_vision_model",
            "projection_dim": spec.vision_hidden,
        }
        fields["image_seq_length"] = spec.tokens_per_tile
        strategy, layer = "default", -2
    if spec.architecture != "llava":
        fields["image_grid_pinpoints"] = _pinpoints(spec)
    return AutoConfig.for_model(
        spec.architecture,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=layer,
        architectures=[_class_name(spec)],
        dtype=spec.dtype,
        **fields,
    )


def _class_name(spec: CheckpointSpec) -> str:
    stem = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}
    return stem[spec.architecture] + "ForConditionalGeneration"


def _pinpoints(spec: CheckpointSpec) -> list[list[int]]:
    side = spec.image_size
    return [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]


def _processor(spec: CheckpointSpec, tokenizer: Any) -> Any:
    import transformers

    side = spec.image_size
    square = {"height": side, "width": side}
    if spec.architecture == "llava_onevision":
        images = transformers.LlavaOnevisionImageProcessor(
            size=square, image_grid_pinpoints=_pinpoints(spec)
        )
        return transformers.LlavaOnevisionProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            video_processor=transformers.LlavaOnevisionVideoProcessor(size=square),
            num_image_tokens=spec.tokens_per_tile,
            vision_feature_select_strategy="full",
            chat_template=CHAT_TEMPLATE,
        )
    common = {
        "tokenizer": tokenizer,
        "patch_size": spec.patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": CHAT_TEMPLATE,
    }
    size = {"size": {"shortest_edge": side}, "crop_size": square}
    if spec.architecture == "llava_next":
        images = transformers.LlavaNextImageProcessor(**size, image_grid_pinpoints=_pinpoints(spec))
        return transformers.LlavaNextProcessor(image_processor=images, **common)
    images = transformers.CLIPImageProcessor(**size)
    return transformers.LlavaProcessor(image_processor=images, **common)


def _weights(spec: CheckpointSpec, config: Any) -> dict[str, Tensor]:
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, _class_name(spec))(config)
    dtype = getattr(torch, spec.dtype)
    weights = {}
    for name, shape in ((name, tensor.shape) for name, tensor in model.state_dict().items()):
        published = published_name(name)
        # a seed per tensor: a deeper or wider model keeps the tensors it shares with a smaller one
        seed = hashlib.sha256(f"{spec.seed}/{published}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
        values = _initial_values(published, shape, spec.layers, generator)
        if published == "language_model.lm_head.weight":
            # an answer of random weights should neither stop early nor contain an image
            values[: len(_SPECIAL_TOKENS)] = 0
        weights[published] = values.to(dtype).contiguous()
    return weights


def published_name(name: str) -> str:
    """Turn the name of transformers 5 into that of the published LLaVA checkpoints."""
    name = name.removeprefix("model.")
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.", 1)
    return f"language_model.{name}" if name.startswith("lm_head.") else name


def _initial_values(
    name: str, shape: torch.Size, layers: int, generator: torch.Generator
) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if name.endswith(".bias"):
        return values.mul_(0.02)
    if "norm" in name or "layrnorm" in name:
        return values.mul_(0.1).add_(1)
    if "embed_tokens" in name or name == "image_newline":
        return values
    if "position_embedding" in name or "class_embedding" in name:
        return values.mul_(0.5)
    return values.mul_(_gain(name, layers) * shape[1:].numel() ** -0.5)


def _gain(name: str, layers: int) -> float:
    """Give the standard deviation of a matrix's output for inputs of unit variance."""
    gains: list[tuple[Callable[[str], bool], float]] = [
        # scores of q k / sqrt(d) get a deviation near 2: some rows matter, none takes all
        (lambda n: n.endswith((".q_proj.weight", ".k_proj.weight")), 1.4),
        # two writes per layer, of inputs well below unit variance (averaged values, gated units):
        # the residual stream grows a few times over the whole depth, whatever the depth
        (lambda n: n.endswith(".self_attn.o_proj.weight"), 2.5 * layers**-0.5),
        (lambda n: n.endswith(".mlp.down_proj.weight"), 5 * layers**-0.5),
        # the tower's last stream is wide: visual tokens should be as large as text ones
        (lambda n: n.startswith("multi_modal_projector.linear_2"), 0.8),
        (lambda n: n == "language_model.lm_head.weight", 2.0),
    ]
    return next((gain for matches, gain in gains if matches(name)), 1.0)
