"""`pruning` where nobody reads it, and keys beside the right place or spelling, are refused."""

import json
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from tokenprune.errors import PolicyError
from tokenprune.request import parse_pruning
from tokenprune.server.body import parse_body, read_body
from tokenprune.server.doors import PruningDoors
from tokenprune.server.service import Service
from tokenprune.server.usage import current_record
from tokenprune.shape import EngineShape, ModelShape

SERVICE = Service(EngineShape(8, (0, 2), 100), ModelShape(64, 64, 4, 2, 16), parse_pruning("off"))


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()

    async def echo(request: Request) -> Any:
        return {"length": len(await request.body()), "path": request.url.path}

    for path in ("/v1/chat/completions", "/v1/embeddings", "/tokenize"):
        app.add_api_route(path, echo, methods=["POST"])
    app.add_middleware(PruningDoors, doors=["/v1/chat/completions"])
    app.state.tokenprune = SERVICE
    return TestClient(app)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/tokenize"])
@pytest.mark.parametrize("value", ["off", "balanced", {"visual": {"method": "uniform"}}, {}])
def test_the_field_is_refused_where_nobody_reads_it(
    client: TestClient, path: str, value: object
) -> None:
    response = client.post(path, json={"model": "m", "pruning": value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("BadRequestError", 400, "pruning")
    assert error["message"] == (
        f"pruning must be left out on {path}, which does not read it; it is read on "
        "/v1/chat/completions"
    )


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"model": "m"}', id="without"),
        pytest.param(b'{"pruning": null}', id="null"),
        pytest.param(b'{"input": "say \\"pruning\\" twice"}', id="in-a-text"),
        pytest.param(b'{"metadata": {"pruning": 1}}', id="inside-another-key"),
        pytest.param(b'["pruning"]', id="list"),
        pytest.param(b'{"pruning": ', id="no-json"),
        pytest.param(b'{"pruning":' + b"[" * 100_000, id="nested-too-deep"),
        pytest.param(json.dumps({"pad": "x" * 3_000_000}).encode(), id="large"),
    ],
)
def test_other_bodies_reach_their_route_whole(client: TestClient, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = client.post("/v1/embeddings", content=body, headers=headers)
    assert response.json() == {"length": len(body), "path": "/v1/embeddings"}


def test_routes_that_read_it_and_bodies_that_are_no_json_are_left_alone(client: TestClient) -> None:
    body = {"pruning": "off"}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    headers = {"content-type": "text/plain"}
    content = json.dumps(body)
    assert client.post("/v1/embeddings", content=content, headers=headers).status_code == 200


NEAR = "the field is called pruning"


@pytest.mark.parametrize(
    ("body", "param", "way_out"),
    [
        *(
            pytest.param({key: "balanced"}, key, NEAR, id=key)
            for key in ("prunning", "Pruning", "prune", "purning", "pruining", "PRUNING")
        ),
        pytest.param(
            {"pruning_visual_method": "uniform"},
            "pruning_visual_method",
            "must be inside vllm_xargs",
            id="flat-key",
        ),
        pytest.param(
            {"extra_body": {"pruning": "balanced"}},
            "extra_body.pruning",
            "must be at the top level",
            id="extra-body",
        ),
        pytest.param(
            {"vllm_xargs": {"prunning_visual_method": "uniform"}},
            "vllm_xargs.prunning_visual_method",
            "pruning_<axis>_<key>",
            id="flat-key-misspelt",
        ),
        pytest.param({"prun" + "x" * 55: 1}, "prun" + "x" * 55, NEAR, id="long"),
    ],
)
def test_a_key_that_was_meant_for_us_is_not_passed_over(
    client: TestClient, body: dict[str, Any], param: str, way_out: str
) -> None:
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert way_out in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x", "presence_penalty": 1, "priority": 2, "prompt_logprobs": 1},
        {"extra_body": {"top_k": 3}, "running": 1, "planning": 2, "parallel_tool_calls": True},
        {"messages": [{"role": "user", "content": 'say "pruning": and "prunning": twice'}]},
        {"vllm_xargs": {"priming": 1, "other": 2}, "metadata": {"prunning": 1}},
        {"p" * 59: 1},
    ],
)
def test_other_keys_reach_their_route(client: TestClient, body: dict[str, Any]) -> None:
    assert client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_a_body_in_another_encoding_is_read_too(client: TestClient, encoding: str) -> None:
    content = json.dumps({"prunning": 1}).encode(encoding)
    headers = {"content-type": "application/json"}
    response = client.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 400


PICTURE = {"type": "image_url", "image_url": {"url": "data:"}}
BLOCK = {"type": "image", "source": {}}
QUESTION = {"type": "text", "text": "which?"}


@pytest.mark.parametrize(
    ("content", "lacks"),
    [
        ([PICTURE], True),
        ([QUESTION, PICTURE], True),
        ([PICTURE, {"type": "text", "text": " \n"}], True),
        ([BLOCK], True),
        ([{"type": "input_image"}, {"type": "input_text", "text": "which?"}], False),
        ([PICTURE, QUESTION], False),
        ("which?", False),
        ([QUESTION], False),
    ],
)
def test_a_picture_without_a_question_is_said(content: Any, lacks: bool) -> None:
    notes = ("no_question_after_image",) if lacks else ()
    for key, messages in (
        ("messages", [{"role": "user", "content": content}]),
        ("input", [{"role": "user", "content": content}]),
        ("messages", [[{"role": "user", "content": content}]]),
    ):
        body = {key: messages, "pruning": "balanced"}
        assert read_body(body, parse_pruning("off")).notes == notes
    # the others choose without the text
    body = {"messages": messages, "pruning": {"visual": {"method": "uniform"}}}
    assert read_body(body, parse_pruning("off")).notes == ()


@pytest.mark.proves("beam search", refused="use_beam_search must be false with pruning")
@pytest.mark.parametrize("key", ["use_beam_search", "background"])
def test_what_the_default_leaves_alone_is_refused_when_asked_for(key: str) -> None:
    default = parse_pruning("balanced")
    assert read_body({key: True}, default).bypass is not None
    assert read_body({key: "no"}, default).bypass is None
    assert read_body({key: "nonsense"}, default).bypass is None
    assert read_body({key: True, "pruning": "off"}, default).bypass is None
    with pytest.raises(PolicyError, match=f"{key} must be false with pruning"):
        read_body({key: True, "pruning": "balanced"}, default)
    with pytest.raises(PolicyError, match=f"{key} must be false with pruning"):
        read_body({key: True, "vllm_xargs": {"pruning": "balanced"}}, default)


def test_the_default_is_seen_in_bodies_that_say_nothing() -> None:
    default = parse_pruning("balanced")
    for body in (b"{}", b'{"use_beam_search": true}'):
        assert parse_body(body, default) == json.loads(body)


def test_a_stream_that_is_refused_after_its_first_event_is_a_400_all_the_same() -> None:
    app = FastAPI()

    async def late(request: Request) -> Any:
        async def events() -> Any:
            yield 'event: e\ndata: {"type":"response.created"}\n\n'
            record = current_record.get()
            assert record is not None
            record.refused = PolicyError("the prompt is too long", "pruning.visual.method")
            raise RuntimeError("caught handled exception, but response already started")

        return StreamingResponse(events(), media_type="text/event-stream")

    for path in ("/v1/responses", "/v1/messages"):
        app.add_api_route(path, late, methods=["POST"])
    app.add_middleware(PruningDoors, doors=["/v1/responses", "/v1/messages"])
    app.state.tokenprune = SERVICE
    client = TestClient(app)
    response = client.post("/v1/responses", json={"pruning": "balanced"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "pruning.visual.method"
    response = client.post("/v1/messages", json={"pruning": "balanced"})
    assert response.json() == {
        "type": "error",
        "error": {"type": "BadRequestError", "message": "the prompt is too long"},
    }
