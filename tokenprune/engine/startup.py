"""What is decided at start: refused, served by vLLM's own classes, or served by ours."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

from tokenprune.engine.settings import settings
from tokenprune.engine.shape import engine_shape
from tokenprune.errors import ConfigurationError
from tokenprune.shape import FEATURES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


def check_supported(vllm_config: VllmConfig) -> None:
    """Refuse engine set-ups the plugin cannot serve as asked.

    Raises:
        ConfigurationError: Naming the setting and the reason.
    """
    shape = engine_shape(vllm_config)
    if shape.prune_layers and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ConfigurationError(
            "prune_layers must be none with --disable-hybrid-kv-cache-manager, which merges the "
            f"stages, got {list(shape.prune_layers)}"
        )
    reason = why_stock(vllm_config)
    if reason is not None and settings(vllm_config).require_pruning:
        raise ConfigurationError(
            f"something must be prunable with --require-pruning, got an engine of which {reason}; "
            "leave the flag out to serve it unpruned"
        )


def why_stock(vllm_config: VllmConfig) -> str | None:
    """Return why nothing can be pruned in this engine, or None if something can."""
    unsupported = engine_shape(vllm_config).unsupported
    return unsupported["kv"] if all(feature in unsupported for feature in FEATURES) else None


def stock_scheduler(vllm_config: VllmConfig) -> Any:
    """Return the scheduler class that vLLM would take by itself, saying so once in the log."""
    logger.warning(
        "nothing can be pruned here: %s; every request is served as vLLM serves it",
        why_stock(vllm_config),
    )
    config = copy.copy(vllm_config.scheduler_config)
    config.scheduler_cls = None
    return config.get_scheduler_cls()
