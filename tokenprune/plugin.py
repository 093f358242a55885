"""The `vllm.general_plugins` entry point: runs in every vLLM process, several times."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Make vLLM know our KV cache spec.

    On an untested vLLM it does nothing but warn, so that a plain `vllm serve` beside an installed
    tokenprune keeps working; our worker and scheduler refuse to start there.
    """
    from tokenprune.engine.compat import check_version
    from tokenprune.errors import InstallationError, VersionError
    from tokenprune.installation import check_distributions

    try:
        check_distributions()
    except InstallationError as error:
        logger.warning("%s", error)
    try:
        check_version()
    except VersionError as error:
        logger.warning("tokenprune is not active: %s", error)
        return
    from tokenprune.engine.kv_cache import register_specs

    register_specs()
