"""The routes on vLLM's own FastAPI parts, with an engine that records what reaches it."""

import json
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY
from vllm.entrypoints.openai.chat_completion import api_router as chat_router
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.completion import api_router as completion_router
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.envs import disable_envs_cache
from vllm.multimodal.inputs import PlaceholderRange
from vllm.plugins.endpoint_plugins.interface import attach_endpoint_plugins
from vllm.sampling_params import SamplingParams

from tokenprune.request import Axes, has_flat, parse_flat, parse_pruning
from tokenprune.server.admission import PlanningClient
from tokenprune.server.service import Service
from tokenprune.shape import EngineShape, ModelShape

ENGINE = EngineShape(
    num_layers=8, boundaries=(0, 2, 3), max_num_batched_tokens=100, max_num_waiting_tokens=100
)
MODEL = ModelShape(hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, head_size=16)
HALVES = {"visual": {"method": "uniform", "prune_layers": [2, 3], "keep_ratios": [0.5, 0.25]}}
COMPLETION_TOKENS = 6


def prompt(num_tokens: int, *images: PlaceholderRange) -> dict[str, Any]:
    return {
        "type": "multimodal",
        "prompt_token_ids": [1] * num_tokens,
        "mm_placeholders": {"image": list(images)},
    }


PHOTO = prompt(50, PlaceholderRange(offset=4, length=40))
PHOTO_LAST = prompt(44, PlaceholderRange(offset=4, length=40))
LONG = prompt(105, PlaceholderRange(offset=4, length=40))
LARGE = prompt(150, PlaceholderRange(offset=4, length=101))
TEXT = prompt(20)


class FakeEngine:
    """Answers every prompt with the same number of tokens, one at a time when streaming."""

    def __init__(self) -> None:
        self.seen: list[SamplingParams] = []
        self.closed = 0

    async def generate(self, prompt: Any, params: SamplingParams, *args: Any) -> AsyncIterator[Any]:
        self.seen.append(params)
        delta = params.output_kind.name == "DELTA"
        try:
            for _ in range(COMPLETION_TOKENS if delta else 1):
                tokens = [7] * (1 if delta else COMPLETION_TOKENS)
                choices = [SimpleNamespace(index=i, token_ids=tokens) for i in range(params.n)]
                yield SimpleNamespace(outputs=choices)
        finally:
            self.closed += 1


class FakeServing:
    """The part of vLLM's serving objects around the engine call, for prompts set by the test."""

    def __init__(self, engine: Any) -> None:
        self.engine_client = engine
        self.prompts: list[dict[str, Any]] = [PHOTO]

    def _generate(self, request: Any) -> list[AsyncIterator[Any]]:
        params = [request.to_sampling_params(COMPLETION_TOKENS, {}) for _ in self.prompts]
        if request.use_beam_search:
            # as vLLM's beam search does: parameters of its own, without the request's keys
            params = [SamplingParams(max_tokens=COMPLETION_TOKENS) for _ in self.prompts]
        pairs = zip(self.prompts, params, strict=True)
        return [self.engine_client.generate(p, s, f"id-{i}") for i, (p, s) in enumerate(pairs)]

    async def create_chat_completion(self, request: Any, raw_request: Any) -> Any:
        outputs = self._generate(request)
        if request.stream:
            return self._stream(outputs)
        for output in outputs:
            async for _ in output:
                pass
        usage = UsageInfo(prompt_tokens=1, completion_tokens=1, total_tokens=2)
        return ChatCompletionResponse(model="m", choices=[], usage=usage)

    async def create_completion(self, request: Any, raw_request: Any) -> Any:
        await self.create_chat_completion(request, raw_request)
        usage = UsageInfo(prompt_tokens=1, completion_tokens=1, total_tokens=2)
        return CompletionResponse(model="m", choices=[], usage=usage)

    async def _stream(self, outputs: list[AsyncIterator[Any]]) -> AsyncIterator[str]:
        for output in outputs:
            async for _ in output:
                yield 'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
        yield 'data: {"choices":[],"usage":{"total_tokens":2}}\n\n'
        yield "data: [DONE]\n\n"


class Server:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: EngineShape, default: Axes) -> None:
        # the plugin comes in as it does in vLLM: by its entry point; an engine that this process
        # started before has made vLLM keep the environment it found
        disable_envs_cache()
        monkeypatch.setenv("VLLM_PLUGINS", "tokenprune")
        app = FastAPI()
        app.include_router(chat_router.router)
        app.include_router(completion_router.router)
        attach_endpoint_plugins(app, ("generate",))
        init_exception_handler(app)
        self.engine = FakeEngine()
        self.serving = FakeServing(PlanningClient(self.engine, engine))
        app.state.args = Namespace(log_error_stack=False, sse_keep_alive_interval=0)
        app.state.openai_serving_chat = app.state.openai_serving_completion = self.serving
        app.state.tokenprune = Service(engine, MODEL, default)
        self.app = app
        self.client = TestClient(app, raise_server_exceptions=False)

    def chat(self, **fields: Any) -> Any:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
        headers = {"content-type": "application/json"}
        # the client's own encoder refuses NaN, which is one of the things sent here
        return self.client.post("/v1/chat/completions", content=json.dumps(body), headers=headers)

    def complete(self, **fields: Any) -> Any:
        return self.client.post("/v1/completions", json={"model": "m", "prompt": "hi", **fields})


Start = Callable[..., Server]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    def start(engine: EngineShape = ENGINE, default: str = "off") -> Server:
        return Server(monkeypatch, engine, parse_pruning(default))

    return start


def test_a_request_without_pruning_is_left_alone(start: Start) -> None:
    server = start()
    response = server.chat()
    assert response.status_code == 200
    assert "x-tokenprune-applied" not in response.headers
    assert "pruning" not in response.json()["usage"]
    assert server.engine.seen[0].extra_args is None


@pytest.mark.parametrize("route", ["chat", "complete"])
def test_pruning_reaches_the_engine_as_flat_keys_and_the_answer_tells(
    start: Start, route: str
) -> None:
    server = start()
    response = getattr(server, route)(pruning=HALVES, vllm_xargs={"other": 1})
    assert response.status_code == 200
    assert response.headers["x-tokenprune-applied"] == "visual=uniform;keep_ratio=0.25;layers=2,3"
    assert int(response.headers["content-length"]) == len(response.content)
    block = response.json()["usage"]["pruning"]
    assert block["visual_tokens_kept"] == {"0": 40, "2": 20, "3": 10}
    assert block["kv_tokens_logical"] == 50 + COMPLETION_TOKENS - 1
    assert server.engine.seen[0].extra_args == {
        "other": 1,
        "pruning_visual_method": "uniform",
        "pruning_visual_prune_layers": [2, 3],
        "pruning_visual_keep_ratios": [0.5, 0.25],
    }


def test_flat_keys_say_the_same_as_the_field(start: Start) -> None:
    server = start()
    flat = {"pruning_visual_method": "uniform", "pruning_visual_keep_ratio": 0.25}
    nested = {"visual": {"method": "uniform", "keep_ratio": 0.25}}
    blocks = [
        server.chat(**fields).json()["usage"]["pruning"]
        for fields in ({"vllm_xargs": flat}, {"pruning": nested})
    ]
    assert blocks[0] == blocks[1]


def test_choices_are_counted_one_by_one(start: Start) -> None:
    block = start().chat(pruning=HALVES, n=3, temperature=1).json()["usage"]["pruning"]
    assert block["visual_tokens"] == 40
    assert block["kv_tokens_logical"] == 3 * 55


def test_prompts_of_one_request_add_up(start: Start) -> None:
    server = start()
    server.serving.prompts = [PHOTO, TEXT]
    answer = server.complete(prompt=["a", "b"], pruning=HALVES).json()
    assert answer["usage"]["pruning"]["kv_tokens_logical"] == 55 + 25
    assert answer["pruning"]["skipped"] == {"visual": "no_visual_tokens"}


def test_a_stream_ends_with_the_same_block_and_closes_the_engine(start: Start) -> None:
    server = start()
    whole = server.chat(pruning=HALVES).json()["usage"]["pruning"]
    response = server.chat(pruning=HALVES, stream=True)
    assert response.headers["x-tokenprune-applied"].startswith("visual=uniform")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[:-2] == ['data: {"choices":[{"delta":{"content":"a"}}]}'] * COMPLETION_TOKENS
    assert json.loads(lines[-2].removeprefix("data: "))["usage"]["pruning"] == whole
    assert lines[-1] == "data: [DONE]"
    assert server.engine.closed == 2


BAD = [
    pytest.param({"pruning": "fast"}, PHOTO, "pruning", "balanced", id="unknown-preset"),
    pytest.param({"pruning": 5}, PHOTO, "pruning", "balanced", id="number"),
    pytest.param({"pruning": ["off"]}, PHOTO, "pruning", "balanced", id="list"),
    pytest.param({"pruning": {"text": {}}}, PHOTO, "pruning.text", "visual", id="unknown-axis"),
    pytest.param(
        {"pruning": {"visual": {"method": "magic"}}},
        PHOTO,
        "pruning.visual.method",
        "transprune",
        id="unknown-method",
    ),
    pytest.param(
        {"pruning": {"visual": {"keep_ratio": 0.5}}},
        PHOTO,
        "pruning.visual.method",
        "transprune",
        id="no-method",
    ),
    pytest.param(
        {"pruning": {"visual": {"method": "uniform", "ratio": 0.5}}},
        PHOTO,
        "pruning.visual.ratio",
        "keep_ratio",
        id="unknown-key",
    ),
    *(
        pytest.param(
            {"pruning": {"visual": {"method": "uniform", "keep_ratio": value}}},
            PHOTO,
            "pruning.visual.keep_ratio",
            "(0, 1]",
            id=f"ratio-{value}",
        )
        for value in (0, -0.5, 1.01, float("nan"), float("inf"), "0.5", None, True, [0.5])
    ),
    pytest.param(
        {"vllm_xargs": {"pruning_visual_method": "uniform", "pruning_visual_keep_ratio": 2}},
        PHOTO,
        "pruning_visual_keep_ratio",
        "(0, 1]",
        id="flat-ratio",
    ),
    pytest.param(
        {"vllm_xargs": {"pruning_speed": 3}}, PHOTO, "pruning_speed", "axis", id="flat-unknown"
    ),
    pytest.param(
        {"pruning": HALVES, "vllm_xargs": {"pruning": "balanced"}},
        PHOTO,
        "pruning",
        "vllm_xargs.pruning",
        id="both-forms",
    ),
    pytest.param(
        {"pruning": {"visual": {"method": "uniform", "prune_layers": [4]}}},
        PHOTO,
        "pruning.visual.prune_layers",
        "[0, 2, 3]",
        id="off-the-boundaries",
    ),
    pytest.param(
        {"pruning": {"visual": {"method": "transprune"}}},
        LONG,
        "pruning.visual.method",
        "at most 100 tokens",
        id="longer-than-a-step",
    ),
    pytest.param(
        {"pruning": {"visual": {"method": "vflowopt"}}},
        LARGE,
        "pruning.visual.method",
        "an image must have at most 100 tokens for pruning.visual.method vflowopt, which takes it "
        "in one step, got 101; raise --max-num-batched-tokens or use another method",
        id="image-longer-than-a-step",
    ),
    pytest.param(
        {"pruning": HALVES, "use_beam_search": True},
        PHOTO,
        "use_beam_search",
        "false",
        id="beam-search",
    ),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("fields", "sent", "param", "legal"), BAD)
def test_what_cannot_be_had_is_a_400_that_names_the_key(
    start: Start, fields: dict[str, Any], sent: dict[str, Any], param: str, legal: str, stream: bool
) -> None:
    server = start()
    server.serving.prompts = [sent]
    response = server.chat(**fields, stream=stream)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("BadRequestError", 400, param)
    assert legal in error["message"]
    assert "parameter=" not in error["message"]
    assert server.engine.seen == []


def test_a_model_that_cannot_be_pruned_says_why(start: Start) -> None:
    server = start(EngineShape(8, (0,), 100, unsupported={"visual": "it uses M-RoPE positions"}))
    error = server.chat(pruning="balanced").json()["error"]
    assert error["param"] == "pruning.visual"
    assert "M-RoPE" in error["message"]
    server.serving.prompts = [TEXT]
    block = server.chat(pruning="balanced").json()["pruning"]
    assert block["skipped"] == {"visual": "model_unsupported"}


def test_a_vision_tower_that_cannot_be_scored_says_why_and_serves_other_methods(
    start: Start,
) -> None:
    server = start(
        EngineShape(8, (0, 2), 100, unsupported={"importance": "the tower is 'pixtral'"})
    )
    error = server.chat(pruning={"visual": {"method": "vflowopt"}}).json()["error"]
    assert error["param"] == "pruning.visual.method"
    assert error["message"].startswith("pruning.visual.method must be another than vflowopt")
    assert "pixtral" in error["message"]
    block = server.chat(pruning={"visual": {"method": "uniform"}}).json()["pruning"]
    assert block["applied"]["visual"] == "uniform"


def test_a_server_that_cannot_evict_says_why(start: Start) -> None:
    server = start(EngineShape(8, (0,), 100, unsupported={"kv": "the KV cache is quantised (fp8)"}))
    server.serving.prompts = [TEXT]
    error = server.chat(pruning={"kv": {"method": "lagkv"}}).json()["error"]
    assert error["param"] == "pruning.kv"
    assert "quantised" in error["message"]


THINK = {"channels": {"method": "think", "keep_ratio": 0.5}}
LONG_TEXT = prompt(600)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        pytest.param(EngineShape(8, (0,), 100), "--allow-channel-pruning", id="not-allowed"),
        pytest.param(
            EngineShape(
                8, (0,), 100, allow_channel_pruning=True, unsupported={"channels": "it has sinks"}
            ),
            "it has sinks",
            id="unsupported",
        ),
    ],
)
def test_a_server_that_cannot_prune_channels_says_why(
    start: Start, engine: EngineShape, message: str
) -> None:
    server = start(engine)
    server.serving.prompts = [LONG_TEXT]
    error = server.chat(pruning=THINK).json()["error"]
    assert error["param"] == "pruning.channels"
    assert message in error["message"]


def test_channels_kept_are_in_the_header_and_what_they_save_in_usage(start: Start) -> None:
    shape = EngineShape(8, (0,), 100, allow_channel_pruning=True, head_size=64, block_size=16)
    server = start(shape)
    server.serving.prompts = [LONG_TEXT]
    response = server.chat(pruning=THINK)
    assert response.headers["x-tokenprune-applied"] == "channels=think;keys=32;values=64"
    block = response.json()["usage"]["pruning"]
    assert response.json()["pruning"]["applied"]["channels"] == "think"
    assert block["kv_tokens_physical"] < 0.85 * block["kv_tokens_logical"]
    assert block["kv_bytes_saved"] > 0


def test_a_prompt_too_short_for_the_window_is_served_whole_and_counted(start: Start) -> None:
    def fallbacks() -> float:
        labels = {"axis": "channels", "reason": "prompt_too_short"}
        return REGISTRY.get_sample_value("tokenprune_fallback_total", labels) or 0.0

    before = fallbacks()
    shape = EngineShape(8, (0,), 100, allow_channel_pruning=True, head_size=64, block_size=16)
    server = start(shape)
    server.serving.prompts = [TEXT]
    block = server.chat(pruning=THINK).json()["pruning"]
    assert block["skipped"] == {"channels": "prompt_too_short"}
    assert fallbacks() == before + 1


def test_a_context_too_short_to_evict_from_is_served_whole_with_the_reason(start: Start) -> None:
    server = start()
    server.serving.prompts = [TEXT]
    block = server.chat(pruning={"kv": {"method": "lagkv", "lag": 10**6}}, max_tokens=5)
    block = block.json()["pruning"]
    assert block["applied"]["kv"] is None
    assert block["skipped"] == {"kv": "context_too_short"}


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        pytest.param(TEXT, "no_visual_tokens", id="text-only"),
        pytest.param(PHOTO_LAST, "no_text_after_image", id="image-last"),
    ],
)
def test_nothing_to_prune_is_served_and_counted(
    start: Start, sent: dict[str, Any], reason: str
) -> None:
    def fallbacks() -> float:
        labels = {"axis": "visual", "reason": reason}
        return REGISTRY.get_sample_value("tokenprune_fallback_total", labels) or 0.0

    server, before = start(), fallbacks()
    server.serving.prompts = [sent]
    response = server.chat(pruning="balanced")
    assert response.headers["x-tokenprune-applied"] == "none"
    block = response.json()["pruning"]
    assert block["applied"]["visual"] is None
    assert block["skipped"] == {"visual": reason}
    assert fallbacks() == before + 1


def test_the_default_holds_for_requests_that_say_nothing(start: Start) -> None:
    server = start(default="balanced")
    response = server.chat()
    assert response.headers["x-tokenprune-applied"].startswith("visual=transprune")
    assert response.json()["pruning"]["applied"]["visual"] == "transprune"
    assert server.engine.seen[0].extra_args == {
        "pruning_visual_method": "transprune",
        "pruning_visual_keep_ratio": 0.25,
    }


def test_off_turns_the_default_off(start: Start) -> None:
    server = start(default="balanced")
    response = server.chat(pruning="off")
    assert "x-tokenprune-applied" not in response.headers
    assert server.engine.seen[0].extra_args is None


@pytest.mark.parametrize(
    ("engine", "sent", "fields", "reason"),
    [
        pytest.param(ENGINE, LONG, {}, "prompt_exceeds_waiting_tokens", id="long"),
        pytest.param(
            EngineShape(8, (0, 2), 100, unsupported={"visual": "M-RoPE"}),
            PHOTO,
            {},
            "model_unsupported",
            id="unsupported",
        ),
        pytest.param(EngineShape(8, (0,), 100), PHOTO, {}, "default_refused", id="no-boundaries"),
        pytest.param(ENGINE, PHOTO, {"use_beam_search": True}, "beam_search", id="beam-search"),
    ],
)
def test_the_default_never_refuses(
    start: Start, engine: EngineShape, sent: dict[str, Any], fields: dict[str, Any], reason: str
) -> None:
    server = start(engine, default="balanced")
    server.serving.prompts = [sent]
    response = server.chat(**fields)
    assert response.status_code == 200
    assert response.headers["x-tokenprune-applied"] == "none"
    assert response.json()["pruning"]["skipped"] == {"visual": reason}


@pytest.mark.parametrize("fields", [{}, {"pruning": "off"}], ids=["default", "off"])
def test_beam_search_is_never_pruned(start: Start, fields: dict[str, Any]) -> None:
    server = start(ENGINE, default="balanced")
    assert server.chat(use_beam_search=True, **fields).status_code == 200
    (params,) = server.engine.seen
    assert not has_flat(params.extra_args)


def test_off_is_off_whatever_the_default(start: Start) -> None:
    server = start(ENGINE, default="balanced")
    response = server.chat(pruning="off")
    (params,) = server.engine.seen
    assert params.extra_args is None
    assert "x-tokenprune-applied" not in response.headers
    assert "pruning" not in response.json()["usage"]


def test_the_default_reaches_the_engine_as_keys(start: Start) -> None:
    server = start(ENGINE, default="balanced")
    assert server.chat().headers["x-tokenprune-applied"].startswith("visual=transprune")
    (params,) = server.engine.seen
    assert parse_flat(params.extra_args) == parse_pruning("balanced")


def test_masked_placeholders_count_only_embedded_positions(start: Start) -> None:
    import torch

    server = start()
    mask = torch.tensor([True, True, False, True, True, True])
    server.serving.prompts = [prompt(20, PlaceholderRange(offset=2, length=6, is_embed=mask))]
    assert server.chat(pruning=HALVES).json()["usage"]["pruning"]["visual_tokens"] == 5


def test_openapi_shows_the_field_with_the_policies(start: Start) -> None:
    schema = start().client.get("/openapi.json").json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
    schemas = schema["components"]["schemas"]
    field = schemas[name]["properties"]["pruning"]
    assert {"$ref": "#/components/schemas/Pruning"} in field["anyOf"]
    assert "description" in schemas["TransPrune"]["properties"]["keep_ratio"]
    assert "/v1/pruning/policies" in schema["paths"]


def test_policies_are_listed(start: Start) -> None:
    listing = start(default="balanced").client.get("/v1/pruning/policies").json()
    assert listing["engine"]["prune_layers"] == [2, 3]
    assert listing["default"]["visual"]["method"] == "transprune"
