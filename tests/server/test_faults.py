"""What clients see when processes stop or end: no hang, and no server that pretends to be well."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from bench.load.bodies import MODEL, picture
from bench.load.server import check_idle, holdings, make_server
from tokenprune.demo.local_server import LocalServer

pytestmark = pytest.mark.vllm

KEY = "a key of the tests"
HEADERS = {"authorization": f"Bearer {KEY}"}
PRUNING = {
    "visual": {"method": "uniform", "keep_ratio": 0.25},
    "kv": {"method": "lagkv", "sink": 4, "lag": 16, "keep_ratio": 0.25},
}
END_SECONDS = 60


def body(max_tokens: int, **fields: Any) -> dict[str, Any]:
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": picture(0)}},
        {"type": "text", "text": "which? " * 20},
    ]
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "pruning": PRUNING,
        **fields,
    }


def ask(server: LocalServer, **fields: Any) -> httpx.Response:
    url = f"{server.url}/v1/chat/completions"
    return httpx.post(url, json=body(12) | fields, headers=HEADERS, timeout=120)


def process(server: LocalServer, name: str) -> psutil.Process:
    (found,) = [h.pid for h in holdings(server) if h.name == name]
    return psutil.Process(found)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    """A server of one's own: most tests here end it."""
    # engines of other tests stay in the test's process; this one has a worker that can be killed
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    with make_server(
        tmp_path, extra=["--api-key", KEY, "--shutdown-timeout", str(END_SECONDS)]
    ) as server:
        server.wait_until_ready()
        yield server


class Stream(threading.Thread):
    """A client that reads a long answer.

    Attributes:
        events: Lines with data that have come.
        error: What ended it, or None.
    """

    def __init__(self, server: LocalServer, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._fields = body(max_tokens, stream=True)
        self._url = f"{server.url}/v1/chat/completions"
        self.events: list[str] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream(
                "POST", self._url, json=self._fields, headers=HEADERS, timeout=END_SECONDS
            ) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self.events.append(line.removeprefix("data: "))
        except httpx.HTTPError as error:
            self.error = error

    def wait_for_token(self) -> None:
        deadline = time.monotonic() + END_SECONDS
        while len(self.events) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    @property
    def is_told(self) -> bool:
        """Whether the client can tell that its answer is not whole."""
        return self.error is not None or any("error" in json.loads(e) for e in self.events[-2:-1])


def test_keys_stopped_workers_clients_that_leave_and_sigterm(server: LocalServer) -> None:
    # who has no key learns nothing, and is not told what is wrong with a request either
    for response in (
        httpx.get(f"{server.url}/v1/pruning/policies"),
        httpx.post(f"{server.url}/v1/chat/completions", json={"pruning": "fast"}),
        httpx.post(f"{server.url}/v1/embeddings", json={"pruning": "fast"}),
    ):
        assert response.status_code == 401
        assert "pruning" not in response.text
    assert httpx.get(f"{server.url}/v1/pruning/policies", headers=HEADERS).status_code == 200

    expected = ask(server).json()["choices"]
    pids = [h.pid for h in holdings(server)]
    worker = process(server, "Worker")
    worker.suspend()
    try:
        # gone before the first token
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}/v1/chat/completions", json=body(200), headers=HEADERS, timeout=2
            )
        assert httpx.get(f"{server.url}/health").status_code == 200
    finally:
        worker.resume()
    assert ask(server).json()["choices"] == expected
    assert check_idle(server, pids) is None

    # with a time to drain; without one the engine ends at once and an open stream just stops
    stream = Stream(server, 150)
    stream.wait_for_token()
    whole = psutil.Process(server.pid)
    others = whole.children(recursive=True)
    whole.send_signal(signal.SIGTERM)
    stream.join(END_SECONDS)
    assert stream.error is None
    assert stream.events[-1] == "[DONE]"
    assert sum('"content"' in event for event in stream.events) >= 100
    assert whole.wait(END_SECONDS) == 0
    _, left = psutil.wait_procs(others, timeout=END_SECONDS)
    assert left == []


@pytest.mark.parametrize("name", ["Worker", "EngineCore"])
def test_a_server_that_lost_a_process_says_so_and_ends(server: LocalServer, name: str) -> None:
    stream = Stream(server, 800)
    stream.wait_for_token()
    whole = psutil.Process(server.pid)
    others = whole.children(recursive=True)
    process(server, name).kill()
    stream.join(END_SECONDS)
    assert not stream.is_alive(), "the client must not wait for ever"
    assert stream.is_told
    # as vLLM does: the service manager must restart it always, not on failure only
    assert whole.wait(END_SECONDS) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    _, left = psutil.wait_procs(others, timeout=END_SECONDS)
    assert left == []
