"""`tokenprune serve` as a child process: started, watched, asked for its metrics, stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.request import ProxyHandler, build_opener

from openai import AsyncOpenAI, DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI

from tokenprune.demo.report import Samples, parse_samples
from tokenprune.errors import TokenPruneError

START_TIMEOUT_SECONDS = 300.0
_STOP_TIMEOUT_SECONDS = 20.0
_ANSWER_TIMEOUT_SECONDS = 30.0


class LocalServer:
    """One server on a free loopback port; leaving the `with` block stops it, whatever happened.

    Without a model it serves the built-in one.

    Attributes:
        url: Where it answers.
        log: File with everything it prints.
    """

    def __init__(self, model: Path | None, arguments: Sequence[str], log: Path) -> None:
        self.log = log
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._command = [
            *(sys.executable, "-m", "tokenprune.cli", "serve"),
            *([] if model is None else [str(model)]),
            *("--host", "127.0.0.1", "--port", str(port), *arguments),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._opener = build_opener(ProxyHandler({}))

    @property
    def pid(self) -> int:
        """Id of the server's first process, once it is started."""
        assert self._process is not None, "the server must be started"
        return self._process.pid

    def __enter__(self) -> LocalServer:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
        with self.log.open("wb") as file:
            # a session of its own: Ctrl-C reaches this process only, which then stops the server
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server and all it started; does nothing where they have ended."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_TIMEOUT_SECONDS)
        # its engine outlives a server that was killed; both are in the group that we made
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def wait_until_ready(self, timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
        """Return once the server answers.

        Raises:
            TokenPruneError: It ended, or did not answer in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise TokenPruneError("the server ended before it was ready; its log says why")
            try:
                self.get("/health")
            except OSError:
                time.sleep(0.25)
            else:
                return
        raise TokenPruneError(
            f"the server must be ready within {timeout_seconds:g} s, and was not; its log says why"
        )

    def metrics(self) -> Samples:
        """Return every sample of the server's metrics page."""
        return parse_samples(self.get("/metrics"))

    def log_tail(self, num_lines: int = 25) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])

    def client(self, timeout_seconds: float) -> OpenAI:
        """Return a client of this server that never asks twice."""
        # a proxy of the environment does not know our loopback, here and below
        http_client = DefaultHttpxClient(trust_env=False)
        return OpenAI(http_client=http_client, **self._options(timeout_seconds))

    def async_client(self, timeout_seconds: float) -> AsyncOpenAI:
        """Return what `client` does, for many requests at a time."""
        http_client = DefaultAsyncHttpxClient(trust_env=False)
        return AsyncOpenAI(http_client=http_client, **self._options(timeout_seconds))

    def get(self, path: str) -> str:
        """Return the body of one of the server's pages."""
        with self._opener.open(self.url + path, timeout=_ANSWER_TIMEOUT_SECONDS) as response:
            body: bytes = response.read()
        return body.decode()

    def _options(self, timeout_seconds: float) -> dict[str, Any]:
        return {
            "base_url": f"{self.url}/v1",
            "api_key": "none",
            "max_retries": 0,
            "timeout": timeout_seconds,
        }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
