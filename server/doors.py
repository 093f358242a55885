"""Every door by which a request reaches the engine: reads `pruning`, refuses, and answers.

One ASGI middleware stands before all of vLLM's routes. What a body asks for becomes a record in
the context of the request; the client that each serving object holds plans by it (`admission.py`)
and hands the keys to the engine; the answer then gets its header and figures here. Routes stay
vLLM's own.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders

from tokenprune.errors import PolicyError
from tokenprune.request import FLAT_PRESET
from tokenprune.server.body import parse_body, read_body
from tokenprune.server.metrics import count_off, count_refused, count_served
from tokenprune.server.service import Service
from tokenprune.server.usage import (
    HEADER,
    RequestRecord,
    add_to_events,
    add_to_whole,
    current_record,
    header_value,
)

_MESSAGES = "/v1/messages"
# the routes whose serving objects send prompts to the engine, as far as those can hold pictures
# or grow; all others refuse the field
DOORS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        _MESSAGES,
        "/v1/responses",
        "/cohere/v2/chat",
        "/inference/v1/generate",
        "/invocations",
    }
)


class PruningDoors:
    """ASGI middleware over all routes.

    Args:
        app: The application.
        doors: Paths of the routes that take the field.
    """

    def __init__(self, app: Any, doors: Collection[str]) -> None:
        self._app = app
        self._doors = frozenset(doors)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Look at the body of a request before its route does."""
        if not _is_looked_at(scope):
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        replay = iter(messages)

        async def received() -> Any:
            return next(replay, None) or await receive()

        path = _path(scope)
        if path in self._doors:
            await self._serve(scope, received, send, body)
        elif _asks(body):
            message = (
                f"{FLAT_PRESET} must be left out on {path}, which does not read it; it is read on "
                f"{', '.join(sorted(self._doors))}"
            )
            await _refusal(path, PolicyError(message))(scope, receive, send)
        else:
            await self._app(scope, received, send)

    async def _serve(self, scope: Any, receive: Any, send: Any, body: bytes) -> None:
        service: Service = scope["app"].state.tokenprune
        content = parse_body(body, service.default)
        try:
            asked = read_body(content, service.default)
        except PolicyError as error:
            count_refused(content.get(FLAT_PRESET))
            await _refusal(_path(scope), error)(scope, receive, send)
            return
        record = RequestRecord(asked.pruning, asked.explicit, asked.bypass, asked.notes)
        token = current_record.set(record)
        try:
            if asked.pruning.is_off:
                count_off()
                await self._app(scope, receive, send)
            else:
                await self._prune(scope, receive, _Reply(send, record, service))
        finally:
            current_record.reset(token)

    async def _prune(self, scope: Any, receive: Any, reply: _Reply) -> None:
        record = reply.record
        try:
            await self._app(scope, receive, reply.send)
        except Exception:
            # a stream is refused when it asks the engine, which may be after its first event
            if record.refused is None or reply.is_begun:
                raise
        if record.refused is not None:
            count_refused(record.pruning)
            if not reply.is_begun:
                await _refusal(_path(scope), record.refused)(scope, receive, reply.send_as_is)


class _Reply:
    """Holds an answer back until it is known what was applied, then adds that to it.

    Attributes:
        record: What the request asked for and got.
        is_begun: Whether anything was sent.
    """

    def __init__(self, send: Any, record: RequestRecord, service: Service) -> None:
        self.record = record
        self.is_begun = False
        self._send = send
        self._service = service
        self._start: Any = None
        self._is_stream = False
        self._held: list[Any] = []

    async def send_as_is(self, message: Any) -> None:
        """Send a message of an answer that is not about pruning."""
        self.is_begun = True
        await self._send(message)

    async def send(self, message: Any) -> None:
        """Take a message of the route's answer."""
        record = self.record
        if message["type"] == "http.response.start":
            self._start = message
            kind = MutableHeaders(raw=message["headers"]).get("content-type", "")
            self._is_stream = kind.startswith("text/event-stream")
        elif self._start["status"] >= 400:
            # in the route's own words; it may have made something else of our refusal
            if record.refused is None or self._start["status"] == 400:
                await self._send_held(message)
        elif self._is_stream:
            admitted = record.prompts or record.bypass is not None or not message.get("more_body")
            if self.is_begun or admitted:
                await self._send_held(message)
            else:
                self._held.append(message)
        else:
            self._held.append(message)
            if not message.get("more_body"):
                await self._send_whole()

    async def _send_held(self, message: Any) -> None:
        is_answer = self._start["status"] < 400
        if not self.is_begun:
            if is_answer:
                self._say_applied()
            await self.send_as_is(self._start)
        held, self._held = [*self._held, message], []
        for message in held:
            body = message.get("body", b"")
            if is_answer and body:
                body = add_to_events(body, self.record, self._service.engine, self._service.model)
            await self._send({**message, "body": body})

    async def _send_whole(self) -> None:
        body = b"".join(message.get("body", b"") for message in self._held)
        body = add_to_whole(body, self.record, self._service.engine, self._service.model)
        self._say_applied()
        MutableHeaders(raw=self._start["headers"])["content-length"] = str(len(body))
        await self.send_as_is(self._start)
        await self._send({"type": "http.response.body", "body": body})

    def _say_applied(self) -> None:
        count_served(self.record, self._service.engine, self._service.model)
        self._start["headers"] = list(self._start["headers"])
        MutableHeaders(raw=self._start["headers"])[HEADER] = header_value(self.record)


def _is_looked_at(scope: Any) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    kinds = (value for name, value in scope["headers"] if name.lower() == b"content-type")
    return any(b"json" in kind for kind in kinds)


def _path(scope: Any) -> str:
    return str(scope["path"].removeprefix(scope.get("root_path", "")))


def _asks(body: bytes) -> bool:
    # most bodies do not hold the word at all, and some are large
    if f'"{FLAT_PRESET}"'.encode() not in body:
        return False
    try:
        found = json.loads(body)
    # a body that is no JSON is its route's to refuse
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get(FLAT_PRESET) is not None


def _refusal(path: str, error: PolicyError) -> JSONResponse:
    """Return a 400 in the words of the route's own API."""
    kind = "BadRequestError"
    if path == _MESSAGES:
        content: Any = {"type": "error", "error": {"type": kind, "message": str(error)}}
    else:
        details = {"message": str(error), "type": kind, "param": error.param, "code": 400}
        content = {"error": details}
    return JSONResponse(content, status_code=400)
