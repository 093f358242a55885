"""What the JSON body of a request asks for, read before any route sees it.

Routes have bodies of their own, but `pruning` and the flat keys stand at the same places in all of
them. A key that was meant for us and is not where, or not spelt as, it must be is refused: the
answer would otherwise be unpruned without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tokenprune.errors import PolicyError
from tokenprune.policies import PromptPolicy
from tokenprune.request import (
    FLAT_PREFIX,
    FLAT_PRESET,
    MAX_NAME,
    Axes,
    asked,
    has_flat,
    parse_pruning,
)

# Most bodies say nothing to us and some are large, so only those with a key that may be ours, or
# that changes what the server's default does, are parsed. A quote inside a text is escaped, so
# texts do not match.
_KEY = re.compile(
    rb'"(extra_body|vllm_xargs|extra_args|use_beam_search|background|p\w{3,60})"', re.I
)
_DECIDING = frozenset({b"extra_body", b"vllm_xargs", b"extra_args"})
# a key as near to the right one as this was meant to be it
_NEAR = 0.8
_BOOL = TypeAdapter(bool)
# what the server's default leaves alone and a request that asks itself is refused for
_BYPASSES = {"use_beam_search": "beam_search", "background": "background"}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for.

    Attributes:
        pruning: What to prune; the server's default where the request says nothing.
        explicit: Whether it says something.
        bypass: Why the default is not applied, or None.
        notes: What the answer should say besides.
    """

    pruning: Axes
    explicit: bool = False
    bypass: str | None = None
    notes: tuple[str, ...] = ()


def parse_body(body: bytes, default: Axes) -> Mapping[str, Any]:
    """Return the body as an object if it may say anything to us, else an empty one."""
    keys = {key.lower() for key in _KEY.findall(body)}
    # UTF-16 and UTF-32, which JSON may come in too
    wide = b"\x00" in body[:4]
    if not (wide or not default.is_off or any(map(_may_be_ours, keys))):
        return {}
    try:
        content = json.loads(body)
    # a body that is no JSON is its route's to refuse
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_body(content: Mapping[str, Any], default: Axes) -> Asked:
    """Return what a body asks for.

    Args:
        content: As `parse_body` returned it.
        default: The server's.

    Raises:
        PolicyError: The field or a flat key is misspelt, misplaced or not legal.
    """
    _check_spelling(content)
    flat = _flat_keys(content)
    field = content.get(FLAT_PRESET)
    if field is None:
        pruning, explicit = asked(flat, default)
    elif has_flat(flat):
        key = min(k for k in flat if k == FLAT_PRESET or k.startswith(FLAT_PREFIX))
        raise PolicyError(f"pruning and vllm_xargs.{_short(key)} exclude each other; leave one out")
    else:
        pruning, explicit = parse_pruning(field), True
    if pruning.is_off:
        return Asked(pruning, explicit)
    bypass = None
    for key, reason in _BYPASSES.items():
        if _is_true(content.get(key)):
            if explicit:
                raise PolicyError(f"{key} must be false with pruning, got true; leave one out", key)
            bypass = reason
    return Asked(pruning, explicit, bypass, tuple(_notes(content, pruning)))


def _may_be_ours(key: bytes) -> bool:
    return key in _DECIDING or _meant(key.decode())


def _meant(key: str) -> bool:
    """Return whether a key is our field's, or a flat key, or looks as if it should have been."""
    head = key.lower().replace("-", "_").partition("_")[0]
    if head.startswith("prun"):
        return True
    # longer ones cannot be near, and would take long to compare
    is_comparable = head.startswith("p") and len(head) < 2 * len(FLAT_PRESET)
    return is_comparable and SequenceMatcher(None, head, FLAT_PRESET).ratio() >= _NEAR


def _check_spelling(content: Mapping[str, Any]) -> None:
    for key in content:
        if key != FLAT_PRESET and _meant(key):
            name = _short(key)
            if key.startswith(FLAT_PREFIX):
                message = f"{name} must be inside vllm_xargs, got it at the top level"
                raise PolicyError(f"{message}; or use the object pruning", name)
            raise PolicyError(f"{name} is unknown; the field is called pruning", name)
    inside = content.get("extra_body")
    for key in inside if isinstance(inside, dict) else ():
        if _meant(key):
            name = f"extra_body.{_short(key)}"
            raise PolicyError(
                f"{name} must be at the top level of the body, got it inside extra_body, which is "
                "an argument of OpenAI's Python client and no field",
                name,
            )
    for key in _flat_keys(content):
        if key != FLAT_PRESET and not key.startswith(FLAT_PREFIX) and _meant(key):
            name = f"vllm_xargs.{_short(key)}"
            raise PolicyError(f"{name} is unknown; flat keys read pruning_<axis>_<key>", name)


def _flat_keys(content: Mapping[str, Any]) -> Mapping[str, Any]:
    found = content.get("vllm_xargs")
    if found is None:
        # of `/inference/v1/generate`, whose body holds vLLM's own parameters
        params = content.get("sampling_params")
        found = params.get("extra_args") if isinstance(params, dict) else None
    return found if isinstance(found, dict) else {}


def _is_true(value: object) -> bool:
    try:
        return value is not None and _BOOL.validate_python(value)
    # the route refuses it
    except ValidationError:
        return False


def _notes(content: Mapping[str, Any], pruning: Axes) -> Iterator[str]:
    """Yield what a client should know of a request that is served as asked."""
    if isinstance(pruning.policy("visual"), PromptPolicy):
        conversations = content.get("messages", content.get("input"))
        if isinstance(conversations, list) and conversations:
            # a batch has a list of conversations
            nested = isinstance(conversations[0], list)
            if any(map(_lacks_question, conversations if nested else [conversations])):
                yield "no_question_after_image"


def _lacks_question(conversation: Any) -> bool:
    """Return whether nothing but what the chat template adds follows the last picture."""
    lacks = False
    for message in conversation if isinstance(conversation, list) else ():
        parts = message.get("content") if isinstance(message, dict) else None
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        for part in parts if isinstance(parts, list) else ():
            kind = str(part.get("type")) if isinstance(part, dict) else ""
            if "image" in kind or "video" in kind:
                lacks = True
            elif "text" in kind and str(part.get("text")).strip():
                lacks = False
    return lacks


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..."
