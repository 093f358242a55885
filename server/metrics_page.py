"""The `/metrics` page where vLLM's own cannot show the engine's figures.

With one API process vLLM's page renders the default registry, and `ENGINE_FIGURES` is there. With
several, vLLM's page reads files that plain metrics share; a collector has none. Every process is
told all figures, so each can add them to what the files hold.
"""

from __future__ import annotations

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest

from tokenprune.server.metrics import ENGINE_FIGURES


def attach_metrics_page(app: FastAPI, registry: CollectorRegistry) -> None:
    """Serve `registry`, which is vLLM's, together with the engine's figures."""
    if registry is REGISTRY:
        return
    registry.register(ENGINE_FIGURES)

    # not a coroutine, so that rendering does not hold up the event loop
    def render() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app.add_api_route("/metrics", render, methods=["GET"], response_model=None)
