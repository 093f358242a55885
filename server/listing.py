"""What `GET /v1/pruning/policies` answers: all a client needs to write a legal request."""

from __future__ import annotations

from typing import Any

from tokenprune.policies import EngineShape, policies
from tokenprune.request import AXES, PRESETS, Axes


def policies_listing(engine: EngineShape, default: Axes) -> dict[str, Any]:
    """Return policies by axis, presets, the engine's boundaries, and the server's default."""
    return {
        "object": "pruning.policies",
        "policies": {
            axis: {name: _describe(cls) for name, cls in policies(axis).items()} for axis in AXES
        },
        "presets": PRESETS,
        "default": default.model_dump(exclude_unset=True, exclude_none=True),
        "engine": {
            "num_layers": engine.num_layers,
            "prune_layers": list(engine.prune_layers),
            "max_num_batched_tokens": engine.max_num_batched_tokens,
            "visual_unsupported": engine.unsupported,
            "kv_unsupported": engine.kv_unsupported,
            "importance_unsupported": engine.importance_unsupported,
            "channels_allowed": engine.allow_channels,
            "channels_unsupported": engine.channels_unsupported,
            "head_size": engine.head_size,
            "block_size": engine.block_size,
            "max_model_len": engine.max_model_len,
        },
    }


def _describe(cls: Any) -> dict[str, Any]:
    return {
        "needs_whole_prompt": getattr(cls, "needs_whole_prompt", False),
        "chooses_per_image": getattr(cls, "chooses_per_image", False),
        "defaults": {
            name: field.default for name, field in cls.model_fields.items() if name != "method"
        },
        "schema": cls.model_json_schema(),
    }
