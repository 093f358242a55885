"""Refuses `pruning` on routes that do not read it, instead of ignoring it without a word."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from fastapi.responses import JSONResponse

_FIELD = "pruning"


class RefuseElsewhere:
    """ASGI middleware over all routes: a JSON body with `pruning` is a 400 where nobody reads it.

    Args:
        app: The application.
        served: Paths of the routes that take the field.
    """

    def __init__(self, app: Any, served: Collection[str]) -> None:
        self._app = app
        self._served = frozenset(served)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Look at the body of a request before its route does."""
        if not self._is_looked_at(scope):
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        if _asks(body):
            await _refusal(scope["path"], self._served)(scope, receive, send)
            return
        replay = iter(messages)

        async def received() -> Any:
            return next(replay, None) or await receive()

        await self._app(scope, received, send)

    def _is_looked_at(self, scope: Any) -> bool:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] in self._served:
            return False
        kinds = (value for name, value in scope["headers"] if name.lower() == b"content-type")
        return any(b"json" in kind for kind in kinds)


def _asks(body: bytes) -> bool:
    # most bodies do not hold the word at all, and some are large
    if f'"{_FIELD}"'.encode() not in body:
        return False
    try:
        found = json.loads(body)
    # a body that is no JSON is its route's to refuse
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get(_FIELD) is not None


def _refusal(path: str, served: Collection[str]) -> JSONResponse:
    message = (
        f"{_FIELD} must be left out on {path}, which does not read it; it is read on "
        f"{', '.join(sorted(served))}"
    )
    error = {"message": message, "type": "BadRequestError", "param": _FIELD, "code": 400}
    return JSONResponse({"error": error}, status_code=400)
