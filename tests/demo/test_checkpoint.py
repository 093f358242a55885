"""The checkpoint builder: complete, deterministic, never half-written."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tokenprune.demo import checkpoint
from tokenprune.demo.checkpoint import CheckpointSpec, build_checkpoint, cached_checkpoint

SMALL: dict[str, Any] = {"layers": 2, "hidden": 64, "heads": 2, "kv_heads": 1, "image_size": 32}


def _digests(path: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(path.iterdir())}


def _picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _last_logits(path: Path, picture: Image.Image, question: str) -> torch.Tensor:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(path)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=prompt, images=picture, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits
    return logits[0, -1]


def test_default_checkpoint_builds_in_seconds(tmp_path: Path) -> None:
    build_checkpoint(tmp_path / "warm", **SMALL)  # imports are not the build
    started = time.process_time()
    path = build_checkpoint(tmp_path / "model")
    assert time.process_time() - started < 10
    assert CheckpointSpec().tokens_per_tile == 144
    assert (path / "model.safetensors").stat().st_size < 20e6


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        ("llava", "llama"),
        ("llava", "mistral"),
        ("llava", "qwen2"),
        ("llava", "qwen3"),
        ("llava_next", "llama"),
        ("llava_onevision", "qwen2"),
    ],
)
def test_transformers_loads_every_weight(tmp_path: Path, architecture: str, family: str) -> None:
    from transformers import AutoModelForImageTextToText

    path = build_checkpoint(tmp_path / "m", architecture=architecture, family=family, **SMALL)
    model, report = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    assert not any(report.values())
    assert model.config.text_config.model_type == family
    logits = _last_logits(path, _picture(0), "What color is it?")
    assert logits.isfinite().all()


def test_weights_carry_the_names_that_vllm_takes(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = build_checkpoint(tmp_path / "m", **SMALL)
    with safe_open(path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    prefixes = (
        "vision_tower.vision_model.",
        "multi_modal_projector.",
        "language_model.model.",
        "language_model.lm_head.weight",
    )
    assert all(any(name.startswith(prefix) for name in names) for prefix in prefixes)
    assert all(name.startswith(prefixes) for name in names)


def test_answers_depend_on_the_picture_and_on_the_question(tmp_path: Path) -> None:
    path = build_checkpoint(tmp_path / "m", **SMALL)
    base = _last_logits(path, _picture(0), "What color is it?")
    for other in (
        _last_logits(path, _picture(1), "What color is it?"),
        _last_logits(path, _picture(0), "How many dogs?"),
    ):
        assert (base - other).abs().mean() > 0.1


def test_chat_template_takes_strings_and_parts(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(build_checkpoint(tmp_path / "m", **SMALL))
    parts = [{"type": "image_url"}, {"type": "text", "text": "How many?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s>SYSTEM: Be brief.\nUSER: <image>\nHow many?\nASSISTANT:"


def test_tokenizer_gives_any_text_back(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(build_checkpoint(tmp_path / "m", **SMALL))
    text = "A naïve 猫, 3 dogs\n\tand £5."
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first = _digests(build_checkpoint(tmp_path / "a", **SMALL))
    again = _digests(build_checkpoint(tmp_path / "b", **SMALL))
    other = _digests(build_checkpoint(tmp_path / "c", seed=1, **SMALL))
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]
    assert first["tokenizer.json"] == other["tokenizer.json"]


def test_a_whole_checkpoint_is_not_built_again(tmp_path: Path) -> None:
    path = build_checkpoint(tmp_path / "m", **SMALL)
    before = (path / "model.safetensors").stat()
    build_checkpoint(path, **SMALL)
    after = (path / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_other_parameters_replace_the_checkpoint(tmp_path: Path) -> None:
    path = build_checkpoint(tmp_path / "m", **SMALL)
    build_checkpoint(path, **{**SMALL, "layers": 3})
    config = json.loads((path / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 3


def test_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_checkpoint(tmp_path / "m", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_checkpoint_is_built_again(tmp_path: Path, damage: str) -> None:
    path = build_checkpoint(tmp_path / "m", **SMALL)
    whole = _digests(path)
    weights = path / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:100])
    assert _digests(build_checkpoint(path, **SMALL)) == whole


def test_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another path"):
        build_checkpoint(tmp_path, **SMALL)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENPRUNE_CACHE", str(tmp_path / "cache"))
    path = cached_checkpoint(CheckpointSpec(**SMALL))
    assert path.parent == tmp_path / "cache"
    assert cached_checkpoint(CheckpointSpec(**SMALL)) == path
