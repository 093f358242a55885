"""The plugin vLLM loads into its API server (`vllm.endpoint_plugins`)."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from typing import Any, ClassVar

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.utils.torch_utils import get_kv_cache_torch_dtype
from vllm.v1.metrics.prometheus import get_prometheus_registry

from tokenprune.engine.config import engine_shape, settings
from tokenprune.engine.launch import WORKER_CLS
from tokenprune.engine.reporting import listen
from tokenprune.policies import EngineShape
from tokenprune.server.flops import ModelShape
from tokenprune.server.metrics import ENGINE_FIGURES
from tokenprune.server.metrics_page import attach_metrics_page
from tokenprune.server.routes import Service, attach_routes
from tokenprune.server.tap import EngineTap


class PruningEndpoints:
    """Adds the `pruning` field, the policy listing and our metrics to vLLM's server."""

    name: ClassVar[str] = "tokenprune"
    required_tasks: ClassVar[tuple[str, ...]] = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Register our routes, which take the place of vLLM's where the path is the same."""
        attach_routes(app)
        attach_metrics_page(app, get_prometheus_registry())

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Read the engine's shape, put the taps in and listen for its figures."""
        vllm_config = engine_client.vllm_config
        engine = _engine_shape(vllm_config)
        if engine.kv_unsupported is None:
            # the attention backend is chosen in the workers
            answers = await engine_client.collective_rpc("tokenprune_kv_unsupported")
            engine = replace(engine, kv_unsupported=next(filter(None, answers), None))
        if engine.allow_channels and engine.channels_unsupported is None:
            channels = await engine_client.collective_rpc("tokenprune_channels")
            unsupported = next((reason for reason, _ in channels if reason), None)
            _, block_size = channels[0]
            engine = replace(engine, channels_unsupported=unsupported, block_size=block_size)
        service = Service(
            engine=engine,
            model=_model_shape(vllm_config),
            default=settings(vllm_config).default_pruning,
            kv_bytes_per_token_layer=_kv_bytes_per_token_layer(vllm_config),
        )
        state.tokenprune = service
        for serving in (state.openai_serving_chat, state.openai_serving_completion):
            serving.engine_client = EngineTap(
                serving.engine_client, service.engine, service.default
            )
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
    return replace(shape, unsupported=reason, kv_unsupported=reason, channels_unsupported=reason)


def _model_shape(vllm_config: Any) -> ModelShape:
    model = vllm_config.model_config
    text = model.hf_text_config
    return ModelShape(
        hidden_size=model.get_hidden_size(),
        intermediate_size=getattr(text, "intermediate_size", 0),
        num_heads=text.num_attention_heads,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
    )


def _kv_bytes_per_token_layer(vllm_config: Any) -> int:
    model = vllm_config.model_config
    dtype = get_kv_cache_torch_dtype(vllm_config.cache_config.cache_dtype, model.dtype)
    return int(2 * model.get_total_num_kv_heads() * model.get_head_size() * dtype.itemsize)
