"""The plugin vLLM loads into its API server (`vllm.endpoint_plugins`)."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any, ClassVar

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.v1.metrics.prometheus import get_prometheus_registry

from tokenprune.engine.launch import WORKER_CLS
from tokenprune.engine.reporting import listen
from tokenprune.engine.settings import settings
from tokenprune.engine.shape import engine_shape, model_shape
from tokenprune.engine.startup import why_stock
from tokenprune.server.admission import PlanningClient
from tokenprune.server.metrics import ENGINE_FIGURES
from tokenprune.server.metrics_page import attach_metrics_page
from tokenprune.server.routes import attach_routes
from tokenprune.server.service import Service
from tokenprune.shape import FEATURES, EngineShape


class PruningEndpoints:
    """Adds the `pruning` field, the policy listing and our metrics to vLLM's server."""

    name: ClassVar[str] = "tokenprune"
    required_tasks: ClassVar[tuple[str, ...]] = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Register our routes and the middleware before vLLM's."""
        attach_routes(app)
        attach_metrics_page(app, get_prometheus_registry())

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Read the engine's shape, stand before its client, and listen for its figures."""
        vllm_config = engine_client.vllm_config
        engine = _engine_shape(vllm_config)
        if _is_ours(vllm_config) and why_stock(vllm_config) is None:
            # the attention backend is chosen in the workers
            for unsupported, block_size in await engine_client.collective_rpc("tokenprune_shape"):
                merged = dict(unsupported) | dict(engine.unsupported)
                engine = replace(engine, unsupported=merged, block_size=block_size)
        service = Service(
            engine=engine,
            model=model_shape(vllm_config),
            default=settings(vllm_config).default_pruning,
        )
        state.tokenprune = service
        for serving in vars(state)["_state"].values():
            if getattr(serving, "engine_client", None) is engine_client:
                serving.engine_client = PlanningClient(engine_client, service.engine)
        if _is_ours(vllm_config):
            listen(engine_client.output_processor, ENGINE_FIGURES.take)


def create() -> PruningEndpoints:
    """Return the plugin."""
    return PruningEndpoints()


def _is_ours(vllm_config: Any) -> bool:
    return bool(vllm_config.parallel_config.worker_cls == WORKER_CLS)


def _engine_shape(vllm_config: Any) -> EngineShape:
    shape = engine_shape(vllm_config)
    if _is_ours(vllm_config):
        return shape
    # the routes are there, but a stock worker would ignore every key without a word
    reason = "this engine runs without the pruning worker; start it with tokenprune serve"
    return replace(shape, unsupported=dict.fromkeys(FEATURES, reason))
