"""Bodies for the server's doors: legal but extreme, and illegal, drawn by Hypothesis.

Methods and their parameters are read from the schemas, so a new method is drawn as it is.
"""

import base64
import io
import math
from functools import cache
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from tokenprune.policies import AXES, methods

MODEL = "tiny"
BOUNDARIES = (0, 2, 3, 5)
# width, height: the tower's own size, small, flat, and one pixel
_SIZES = ((96, 96), (96, 96), (200, 50), (7, 300), (1, 1))
_NUM_PICTURES = 12
# numbers that arithmetic stumbles over; those out of a parameter's bounds are refused
_EXTREMES = (0, 1, 1e-300, 5e-324, 1e-9, 0.5, 1 - 2**-53, 2.0, 65536, 1e6)
_SMALL = (0, 1, 2, 8, 15, 16, 17, 31, 32, 33, 64, 127, 144, 255, 256, 1024)
_WRONG = (
    None,
    "",
    "0.5",
    [],
    {},
    -1,
    2**63,
    2**64,
    10**400,
    1e308,
    math.nan,
    math.inf,
    True,
    "x" * 5000,
    [[1]] * 300,
    list(range(5000)),
    {"a": {"b": {"c": [1] * 100}}},
    "\ud800",
    "a\r\nb",
)


@cache
def picture(number: int) -> str:
    """Return one of a few pictures as a data URL."""
    rng = np.random.default_rng(number)
    width, height = _SIZES[number % len(_SIZES)]
    blocks = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _number(schema: dict[str, Any]) -> st.SearchStrategy[float]:
    low = schema.get("minimum", schema.get("exclusiveMinimum", -1000))
    high = schema.get("maximum", schema.get("exclusiveMaximum", 1e6))
    ends = (low, high, math.nextafter(low, high), math.nextafter(high, low))
    legal = [x for x in (*ends, *_EXTREMES) if low <= x <= high]
    return st.sampled_from(legal) | st.floats(low, high, allow_nan=False)


def _integer(schema: dict[str, Any]) -> st.SearchStrategy[int]:
    low, high = schema.get("minimum", 0), schema.get("maximum", 2**31 - 1)
    legal = [x for x in (low, low + 1, high, high - 1, *_SMALL) if low <= x <= high]
    return st.sampled_from(legal) | st.integers(low, min(high, low + 300))


def _legal(name: str, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    branches = [b for b in schema.get("anyOf", [schema]) if b.get("type") != "null"]
    (branch,) = branches
    if "enum" in branch:
        return st.sampled_from(branch["enum"])
    if branch["type"] == "boolean":
        return st.booleans()
    if branch["type"] == "integer":
        return _integer(branch)
    if branch["type"] == "number":
        return _number(branch)
    sizes = {"min_size": branch.get("minItems", 1), "max_size": min(branch.get("maxItems", 4), 4)}
    if name == "prune_layers":
        return st.lists(st.sampled_from(BOUNDARIES), unique=True, **sizes).map(sorted)
    # shares that fall are legal more often
    shares = st.lists(_number({"exclusiveMinimum": 0, "maximum": 1}), **sizes)
    return shares.map(lambda found: sorted(found, reverse=True))


@st.composite
def policies(draw: st.DrawFn, axis: str) -> dict[str, Any]:
    """Draw a method of an axis with parameters that are each legal."""
    name = draw(st.sampled_from(sorted(methods(axis))))
    properties = methods(axis)[name].model_json_schema()["properties"]
    chosen = {"method": name}
    for key, schema in properties.items():
        if key != "method" and draw(st.integers(0, 2)) == 0:
            chosen[key] = draw(_legal(key, schema))
    # partitions and windows that fit the prompts, so that something happens
    if axis == "kv" and draw(st.booleans()):
        chosen |= {"sink": draw(st.integers(0, 40)), "lag": draw(st.integers(16, 80))}
    if axis == "channels" and draw(st.booleans()):
        chosen |= {"window": draw(st.integers(1, 64)), "recent": draw(st.integers(0, 64))}
    return chosen


@st.composite
def prunings(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a `pruning` object; about one in eight is damaged."""
    field = {axis: draw(policies(axis)) for axis in AXES if draw(st.booleans())}
    if field and draw(st.integers(0, 7)) == 0:
        target = field[draw(st.sampled_from(sorted(field)))]
        key = draw(st.sampled_from([*sorted(target), "unknown", "k" * 300, "keep ratio\n"]))
        target[key] = draw(st.sampled_from(_WRONG))
    return field


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[str], str]:
    """Draw pictures and a text."""
    numbers = st.lists(st.integers(0, _NUM_PICTURES - 1), max_size=3)
    urls = [picture(number) for number in draw(numbers)]
    return urls, "word " * draw(st.sampled_from([1, 5, 40, 150, 400])) + "which?"


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Draw a path and a body."""
    urls, text = draw(conversations())
    max_tokens = draw(st.sampled_from([1, 2, 3, 6, 12, 30, 60]))
    path = draw(st.sampled_from(["chat"] * 6 + ["text", "batch", "responses", "messages"]))
    path, body = _door(path, urls, text, max_tokens)
    body |= {"model": MODEL, "temperature": draw(st.sampled_from([0, 0, 1]))}
    if path.startswith("/v1/c"):
        body |= draw(_options(path))
    kind = draw(st.sampled_from(["field"] * 12 + ["flat", "preset", "none", "wrong", "misplaced"]))
    field = draw(prunings())
    if kind == "field":
        body["pruning"] = field
    elif kind == "flat":
        body["vllm_xargs"] = {
            f"pruning_{axis}_{key}": value
            for axis, policy in field.items()
            for key, value in policy.items()
        }
    elif kind == "preset":
        body["pruning"] = draw(st.sampled_from(["off", "safe", "balanced", "aggressive", "fast"]))
    elif kind == "wrong":
        body["pruning"] = draw(st.sampled_from(_WRONG))
    elif kind == "misplaced":
        key = draw(st.sampled_from(["prunning", "extra_body", "pruning_visual", "vllm_xargs"]))
        body[key] = {"pruning": field}
    return path, body


@st.composite
def _options(draw: st.DrawFn, path: str) -> dict[str, Any]:
    options: dict[str, Any] = {"priority": draw(st.integers(-2, 2))}
    if draw(st.integers(0, 3)) == 0:
        options["ignore_eos"] = True
    if not path.endswith("batch"):
        # beam search and log-probs of the prompt cannot be streamed
        kind = draw(st.sampled_from(["whole"] * 8 + ["stream"] * 5 + ["beams", "prompt_logprobs"]))
        if kind == "stream":
            options |= {"stream": True, "stream_options": {"include_usage": True}}
        elif kind == "prompt_logprobs":
            options["prompt_logprobs"] = 1
        if kind == "beams":
            options |= {"use_beam_search": True, "n": 2}
        elif draw(st.integers(0, 5)) == 0:
            options |= {"n": draw(st.integers(2, 4)), "temperature": 1, "seed": 1}
    return options


def _door(kind: str, urls: list[str], text: str, max_tokens: int) -> tuple[str, dict[str, Any]]:
    pictures: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    chat = [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]
    if kind == "chat":
        return "/v1/chat/completions", {"messages": chat, "max_tokens": max_tokens}
    if kind == "batch":
        body = {"messages": [chat, chat], "max_tokens": max_tokens}
        return "/v1/chat/completions/batch", body
    if kind == "text":
        return "/v1/completions", {"prompt": [text, "a b c"], "max_tokens": max_tokens}
    if kind == "responses":
        parts = [{"type": "input_image", "image_url": url, "detail": "auto"} for url in urls]
        content = [*parts, {"type": "input_text", "text": text}]
        body = {"input": [{"role": "user", "content": content}], "store": False}
        return "/v1/responses", body | {"max_output_tokens": max_tokens}
    blocks = [
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]},
        }
        for url in urls
    ]
    content = [*blocks, {"type": "text", "text": text}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
    return "/v1/messages", body


def draw_bodies(number: int, count: int) -> list[tuple[str, dict[str, Any]]]:
    """Return `count` paths and bodies; the same ones for the same number, on every run."""
    found: list[tuple[str, dict[str, Any]]] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(bodies())
    def collect(drawn: tuple[str, dict[str, Any]]) -> None:
        found.append(drawn)

    collect()
    return found[:count]
