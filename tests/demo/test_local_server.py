"""How the demo treats its child process: it never outlives the demo, and its log is shown."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tokenprune.demo.local_server import LocalServer
from tokenprune.errors import TokenPruneError


class Script(LocalServer):
    """A child process that runs `code` in place of a model server."""

    def __init__(self, code: str, log: Path) -> None:
        super().__init__(Path("model"), [], log)
        self._command = [sys.executable, "-c", code]


def test_server_that_ends_is_reported_with_its_log(tmp_path: Path) -> None:
    with Script("raise SystemExit('no such model')", tmp_path / "log") as server:
        with pytest.raises(TokenPruneError, match="ended before it was ready"):
            server.wait_until_ready(60)
        assert server.log_tail() == "no such model"


def test_server_that_hangs_is_given_up_and_stopped(tmp_path: Path) -> None:
    with Script("import time; time.sleep(600)", tmp_path / "log") as server:
        with pytest.raises(TokenPruneError, match="must be ready within 1 s"):
            server.wait_until_ready(1)
        process = server._process
    assert process is not None
    assert process.poll() is not None


def test_interrupt_stops_the_server(tmp_path: Path) -> None:
    def interrupted() -> None:
        with Script("import time; time.sleep(600)", tmp_path / "log") as server:
            children.append(server._process)
            raise KeyboardInterrupt

    children: list[Any] = []
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert children[0].poll() is not None
    assert time.monotonic() - started < 10


def test_children_of_a_server_that_died_are_stopped(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid)"
    )
    with Script(code, tmp_path / "log") as server, pytest.raises(TokenPruneError):
        server.wait_until_ready(60)
    stat = Path("/proc") / server.log_tail() / "stat"
    deadline = time.monotonic() + 10
    # whoever adopts the child may be slow to reap it
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the child still runs"
        time.sleep(0.05)


@pytest.fixture
def pages() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps({"object": "list", "data": []}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_a_proxy_of_the_environment_is_not_asked(
    pages: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        # nobody listens there
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = LocalServer(None, [], tmp_path / "log")
    server.url = pages

    async def ask() -> None:
        async with server.async_client(10) as client:
            await client.models.list()

    with server.client(10) as client:
        assert client.models.list().data == []
    asyncio.run(ask())
    assert json.loads(server.get("/"))["data"] == []
