"""vLLM's `/metrics` page, with the engine's pruning figures asked for right before it renders.

On demand and not on a timer: the workers answer between two steps, so each question costs the
engine a moment, and nobody reads the figures between two scrapes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.concurrency import run_in_threadpool

from tokenprune.server.metrics import ENGINE_FIGURES

logger = logging.getLogger(__name__)

Fetch = Callable[[], Awaitable[Sequence[Sequence[Any]]]]

# two scrapers, or one that retries, share an answer this old
_MIN_AGE_SECONDS = 0.5
# a long step must not hold the page up; its answer shows on the next scrape
_MAX_WAIT_SECONDS = 1.0


class MetricsPage:
    """Renders a registry after refreshing the engine's figures.

    Attributes:
        fetch: Returns figures per engine and worker; None until the engine is known.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._pending: asyncio.Task[None] | None = None
        self._asked_at = -_MIN_AGE_SECONDS
        self.fetch: Fetch | None = None

    async def render(self) -> Response:
        """Return metrics in the Prometheus text format."""
        await self._refresh()
        content = await run_in_threadpool(generate_latest, self._registry)
        return Response(content, headers={"content-type": CONTENT_TYPE_LATEST})

    async def _refresh(self) -> None:
        if self.fetch is None:
            return
        if self._pending is None or self._pending.done():
            if monotonic() - self._asked_at < _MIN_AGE_SECONDS:
                return
            self._asked_at = monotonic()
            self._pending = asyncio.create_task(self._update(self.fetch))
        await asyncio.wait({self._pending}, timeout=_MAX_WAIT_SECONDS)

    async def _update(self, fetch: Fetch) -> None:
        try:
            ENGINE_FIGURES.update(await fetch())
        except Exception as error:
            # whatever is wrong with the engine, the page that tells operators must still open
            logger.warning("the engine's pruning figures are stale: %s", error)
