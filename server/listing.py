"""What `GET /v1/pruning/policies` answers: all a client needs to write a legal request."""

from __future__ import annotations

from typing import Any

from tokenprune.policies import AXES, ImagePolicy, Policy, PromptPolicy, methods
from tokenprune.request import PRESETS, Axes
from tokenprune.shape import FEATURES, EngineShape


def policies_listing(engine: EngineShape, default: Axes) -> dict[str, Any]:
    """Return policies by axis, presets, the engine's boundaries, and the server's default."""
    return {
        "object": "pruning.policies",
        "policies": {
            axis: {name: _describe(cls) for name, cls in methods(axis).items()} for axis in AXES
        },
        "presets": PRESETS,
        "default": default.model_dump(exclude_unset=True, exclude_none=True),
        "engine": {
            "num_layers": engine.num_layers,
            "prune_layers": list(engine.prune_layers),
            "max_num_batched_tokens": engine.max_num_batched_tokens,
            "max_num_waiting_tokens": engine.max_num_waiting_tokens,
            **{f"{name}_unsupported": engine.unsupported.get(name) for name in FEATURES},
            "allow_channel_pruning": engine.allow_channel_pruning,
            "head_size": engine.head_size,
            "block_size": engine.block_size,
            "max_model_len": engine.max_model_len,
        },
    }


def _describe(cls: type[Policy]) -> dict[str, Any]:
    return {
        "needs_whole_prompt": issubclass(cls, PromptPolicy),
        "chooses_per_image": issubclass(cls, ImagePolicy),
        "defaults": {
            name: field.get_default(call_default_factory=True)
            for name, field in cls.model_fields.items()
            if name != "method" and not field.is_required()
        },
        "schema": cls.model_json_schema(),
    }
