"""Engine-wide settings: what `--additional-config '{"tokenprune": {...}}'` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenprune.errors import ConfigurationError
from tokenprune.policies import check_plugins
from tokenprune.request import Axes, add_presets, parse_pruning

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONFIG_KEY = "tokenprune"
_SWITCHES = ("allow_channel_pruning", "require_pruning")
_SETTINGS = ("presets", "prune_layers", "default", "max_num_waiting_tokens", *_SWITCHES)


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one engine.

    Attributes:
        prune_layers: Stage boundaries asked for, or None for the default of the model's depth.
        default_pruning: What the server asks for where an HTTP request says nothing.
        allow_channel_pruning: Whether requests may prune KV channels; attention then also looks
            for rows with packed blocks.
        require_pruning: Whether an engine that can prune nothing is refused.
        max_num_waiting_tokens: Rows of pruned prompts that there is room for until their prompt is
            complete, or None for the default.
    """

    prune_layers: tuple[int, ...] | None
    default_pruning: Axes
    allow_channel_pruning: bool = False
    require_pruning: bool = False
    max_num_waiting_tokens: int | None = None


def settings(vllm_config: VllmConfig) -> Settings:
    """Read the plugin's settings, and make the presets among them known to this process.

    Raises:
        ConfigurationError: A key is unknown, a value has the wrong type, or a policy plugin did
            not load.
        PolicyError: The default pruning or a preset is not legal.
    """
    # every process that reads requests reads the settings first
    check_plugins()
    additional = vllm_config.additional_config
    raw: Any = additional.get(CONFIG_KEY, {}) if isinstance(additional, dict) else {}
    if not isinstance(raw, dict):
        raise ConfigurationError(
            f"{CONFIG_KEY} settings must be an object with {', '.join(_SETTINGS)}, got {raw!r}"
        )
    unknown = set(raw) - set(_SETTINGS)
    if unknown:
        raise ConfigurationError(
            f"{CONFIG_KEY} settings must be among {', '.join(_SETTINGS)}, got {sorted(unknown)}"
        )
    layers = raw.get("prune_layers")
    if layers is not None and not (
        isinstance(layers, list) and all(type(layer) is int for layer in layers)
    ):
        raise ConfigurationError(f"prune_layers must be a list of layer numbers, got {layers!r}")
    switches = {name: raw.get(name, False) for name in _SWITCHES}
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ConfigurationError(f"{name} must be true or false, got {value!r}")
    waiting = raw.get("max_num_waiting_tokens")
    if waiting is not None and not (type(waiting) is int and waiting >= 0):
        raise ConfigurationError(
            f"max_num_waiting_tokens must be a number of tokens, at least 0, got {waiting!r}"
        )
    add_presets(raw.get("presets", {}))
    boundaries = None if layers is None else tuple(layers)
    return Settings(
        boundaries,
        parse_pruning(raw.get("default")),
        max_num_waiting_tokens=waiting,
        **switches,
    )
