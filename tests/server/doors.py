"""Each route that takes `pruning`, with a body of its own shape and where its answer says what."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Door:
    """A route, asked one question about pictures given as data URLs."""

    path: str
    body: Callable[[list[str], str, int], dict[str, Any]]
    streams: bool = True
    num_prompts: int = 1


def _chat(urls: list[str], text: str, max_tokens: int) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}


def _batch(urls: list[str], text: str, max_tokens: int) -> dict[str, Any]:
    body = _chat(urls, text, max_tokens)
    return {**body, "messages": [body["messages"]] * 2}


def _responses(urls: list[str], text: str, max_tokens: int) -> dict[str, Any]:
    parts = [{"type": "input_image", "image_url": url, "detail": "auto"} for url in urls]
    content = [*parts, {"type": "input_text", "text": text}]
    return {
        "input": [{"role": "user", "content": content}],
        "max_output_tokens": max_tokens,
        "store": False,
    }


def _messages(urls: list[str], text: str, max_tokens: int) -> dict[str, Any]:
    parts = [
        {
            "type": "image",
            "source": {
                "type": "base64",
                "media_type": "image/png",
                "data": url.partition(",")[2],
            },
        }
        for url in urls
    ]
    content = [*parts, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}


DOORS = [
    Door("/v1/chat/completions", _chat),
    Door("/v1/chat/completions/batch", _batch, streams=False, num_prompts=2),
    Door("/v1/responses", _responses),
    Door("/v1/messages", _messages),
    Door("/invocations", _chat),
]
