"""The built-in model: where it lies, whether it is whole, and how it is served.

The package carries one small trained vision-language model, so that pruning can be tried and
measured without a network. Its card is the `README.md` in its folder.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenprune.errors import InstallationError
from tokenprune.installation import REINSTALL

NAME = "tokenprune-demo"
FOLDER = Path(__file__).parent / "model"
CARD = "README.md"
_WEIGHTS, _RECORD = "model.safetensors", "accuracy.json"
FILES = (
    *(_WEIGHTS, _RECORD, CARD, "config.json", "generation_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "processor_config.json", "chat_template.jinja"),
)
AGAIN = f"reinstall it: {REINSTALL}"

_KV_CACHE_BYTES = 256 << 20


def model_folder(folder: Path = FOLDER) -> Path:
    """Return the folder of the built-in model after checking that it is whole.

    Args:
        folder: Where to look.

    Raises:
        InstallationError: A file is missing or damaged, or the weights are not those whose
            accuracy is recorded beside them.
    """
    for name in FILES:
        path = folder / name
        if not path.is_file():
            raise InstallationError(f"{path} must come with tokenprune, got no such file; {AGAIN}")
        if path.suffix == ".json":
            read_json(path)
    weights = folder / _WEIGHTS
    found, expected = _sha256(weights), recorded_sha256(folder)
    if found != expected:
        raise InstallationError(
            f"{weights} must have the sha256 {expected[:12]} that {_RECORD} names, "
            f"got {found[:12]}; {AGAIN}"
        )
    return folder


def recorded_sha256(folder: Path = FOLDER) -> str:
    """Return the hash of the weights whose accuracy is recorded in a folder."""
    weights = read_json(folder / _RECORD).get("weights")
    return str(weights.get("sha256")) if isinstance(weights, dict) else ""


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file that the package ships.

    Raises:
        InstallationError: It holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InstallationError(f"{path} must hold JSON, got: {error}; {AGAIN}") from None
    if not isinstance(content, dict):
        raise InstallationError(f"{path} must hold an object, got {content!r:.40}; {AGAIN}")
    return content


def serve_flags() -> dict[str, str | None]:
    """Return the flags of `vllm serve` that suit this model, None for a switch.

    A user's flags come before them.
    """
    import torch

    flags: dict[str, str | None] = {
        "--served-model-name": NAME,
        # vLLM would take most of the memory for a model whose longest prompt needs 16 MiB
        "--kv-cache-memory-bytes": str(_KV_CACHE_BYTES),
        # its longest prompt in one step, which transprune needs
        "--max-num-batched-tokens": "4096",
        "--dtype": served_dtype(),
    }
    if torch.cuda.is_available():
        return flags
    # compiling takes a CPU longer than all that is asked of a model so small, and a picture is 144
    # tokens: in vLLM's blocks of 128 for a CPU, a pruned one takes hardly less room
    return {**flags, "--enforce-eager": None, "--block-size": "32"}


def served_dtype() -> str:
    """Return `bfloat16` with a GPU, else `float32`.

    Many CPUs have no fast bfloat16, and GPU attention kernels have no float32.
    """
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"
