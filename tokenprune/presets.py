"""Files of named presets: what `--pruning-presets` reads and `tokenprune calibrate` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from tokenprune.errors import ConfigurationError, PolicyError
from tokenprune.request import add_presets


def load_presets(path: Path) -> dict[str, Any]:
    """Return the presets of a file, which are known to this process from then on.

    Args:
        path: A YAML file, or a JSON file where the name ends in `.json`: an object that maps the
            name of each preset to what a request's `pruning` may say as an object.

    Raises:
        ConfigurationError: The file cannot be read or its presets are not legal; the message
            names file, preset and key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        # YAML takes 1e-5 for a word
        presets = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(
            f"{path} must be a YAML or JSON file of presets, got: {reason}"
        ) from None
    try:
        add_presets(presets)
    except PolicyError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    return dict(presets)


def dump_presets(presets: dict[str, Any], comment: str) -> str:
    """Return a YAML file of presets under a comment of several lines."""
    lines = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    return f"{lines}\n{yaml.safe_dump(presets, sort_keys=False)}"
