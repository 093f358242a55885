"""`pruning` on a route that does not read it is refused; everything else passes untouched."""

import json
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from tokenprune.server.elsewhere import RefuseElsewhere


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()

    async def echo(request: Request) -> Any:
        return {"length": len(await request.body()), "path": request.url.path}

    for path in ("/v1/chat/completions", "/v1/responses", "/invocations"):
        app.add_api_route(path, echo, methods=["POST"])
    app.add_middleware(RefuseElsewhere, served=["/v1/chat/completions"])
    return TestClient(app)


@pytest.mark.parametrize("path", ["/v1/responses", "/invocations"])
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
    response = client.post("/v1/responses", content=body, headers=headers)
    assert response.json() == {"length": len(body), "path": "/v1/responses"}


def test_routes_that_read_it_and_bodies_that_are_no_json_are_left_alone(client: TestClient) -> None:
    body = {"pruning": "off"}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    headers = {"content-type": "text/plain"}
    content = json.dumps(body)
    assert client.post("/v1/responses", content=content, headers=headers).status_code == 200
