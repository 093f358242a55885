"""The HTTP routes: vLLM's own two completion routes with a `pruning` field, and the listing.

A route here reads the field, calls vLLM's route, and adds to its answer. Everything between is
vLLM's: rendering, sampling, streaming, cancellation, errors.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import Field, PlainValidator
from vllm.entrypoints.openai.chat_completion import api_router as chat_router
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion import api_router as completion_router
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError

from tokenprune.errors import PolicyError
from tokenprune.request import (
    FLAT_PREFIX,
    FLAT_PRESET,
    Axes,
    PruningField,
    asked,
    flatten,
    has_flat,
    parse_pruning,
)
from tokenprune.server.elsewhere import RefuseElsewhere
from tokenprune.server.listing import policies_listing
from tokenprune.server.metrics import count_off, count_refused, count_served
from tokenprune.server.usage import (
    HEADER,
    RequestRecord,
    add_to_stream,
    current_record,
    header_value,
    usage_block,
)
from tokenprune.shape import EngineShape, ModelShape

Handler = Callable[..., Awaitable[Response | None]]

# read as it comes: `parse_pruning` in the route turns what is wrong into one OpenAI error body
# that names the key, where FastAPI would list every branch of the union
_Field = Annotated[
    Any, PlainValidator(lambda value: value, json_schema_input_type=PruningField | None)
]
_FIELD = Field(
    default=None,
    description="What to prune for this request: a preset's name or an object with one method "
    "per axis; 'off' turns the server's default off. See GET /v1/pruning/policies.",
)


class PrunableChatCompletionRequest(ChatCompletionRequest):
    """vLLM's chat completion request with the `pruning` field."""

    # vLLM caches its known names per class here; an inherited cache would lack ours
    field_names: ClassVar[set[str] | None] = None
    pruning: _Field = _FIELD


class PrunableCompletionRequest(CompletionRequest):
    """vLLM's completion request with the `pruning` field."""

    field_names: ClassVar[set[str] | None] = None
    pruning: _Field = _FIELD


class PruningRefusedError(VLLMValidationError):
    """A refused request; vLLM answers it with HTTP 400 and `param`."""

    def __str__(self) -> str:
        # vLLM's form repeats the parameter after the message, which names it already
        return str(self.args[0])


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes need of the engine; lies in `app.state.tokenprune`.

    Attributes:
        engine: What plans need.
        model: What costs need.
        default: Applied to requests that say nothing about pruning.
    """

    engine: EngineShape
    model: ModelShape
    default: Axes


async def create_chat_completion(
    request: PrunableChatCompletionRequest, raw_request: Request
) -> Response | None:
    """Create a chat completion; as vLLM's route, with per-request pruning."""
    return await _serve(request, raw_request, chat_router.create_chat_completion)


async def create_completion(
    request: PrunableCompletionRequest, raw_request: Request
) -> Response | None:
    """Create a completion; as vLLM's route, with per-request pruning."""
    return await _serve(request, raw_request, completion_router.create_completion)


async def list_policies(raw_request: Request) -> dict[str, Any]:
    """List pruning policies with their parameters, the presets, and what this engine allows."""
    service: Service = raw_request.app.state.tokenprune
    return policies_listing(service.engine, service.default)


def attach_routes(app: FastAPI) -> None:
    """Add our routes, which vLLM lets replace those of their paths; refuse the field elsewhere."""
    replaced: dict[Handler, Handler] = {
        chat_router.create_chat_completion: create_chat_completion,
        completion_router.create_completion: create_completion,
    }
    served = []
    for route in list(app.routes):
        if isinstance(route, APIRoute) and route.endpoint in replaced:
            served.append(route.path)
            app.add_api_route(
                route.path,
                replaced[route.endpoint],
                methods=["POST"],
                response_model=None,
                dependencies=route.dependencies,
                responses=route.responses,
            )
    app.add_api_route("/v1/pruning/policies", list_policies, methods=["GET"])
    app.add_middleware(RefuseElsewhere, served=served)


async def _serve(request: Any, raw_request: Request, stock: Handler) -> Response | None:
    service: Service = raw_request.app.state.tokenprune
    pruning: Any = request.pruning
    try:
        pruning, explicit = _take_pruning(request, service.default)
        record = RequestRecord(pruning, explicit)
        if pruning.is_off:
            count_off()
        elif request.use_beam_search:
            if explicit:
                raise PolicyError(
                    "use_beam_search must be false with pruning, got true; leave one out",
                    "use_beam_search",
                )
            record.bypass = "beam_search"
        token = current_record.set(record)
        try:
            response = await stock(request, raw_request)
        finally:
            current_record.reset(token)
    except PolicyError as error:
        count_refused(pruning)
        raise PruningRefusedError(str(error), parameter=error.param) from None
    if not pruning.is_off and response is not None and response.status_code < 400:
        count_served(record, service.engine, service.model)
        _describe(response, record, service)
    return response


def _take_pruning(request: Any, default: Axes) -> tuple[Axes, bool]:
    """Return what is asked for and whether by the request; move the field to the flat keys."""
    flat = request.vllm_xargs
    if request.pruning is None:
        return asked(flat, default)
    if has_flat(flat):
        key = min(k for k in flat if k == FLAT_PRESET or k.startswith(FLAT_PREFIX))
        raise PolicyError(f"pruning and vllm_xargs.{key} exclude each other; leave one out")
    pruning = parse_pruning(request.pruning)
    request.vllm_xargs = {**(flat or {}), **flatten(pruning)}
    return pruning, True


def _describe(response: Response, record: RequestRecord, service: Service) -> None:
    block = partial(usage_block, record, service.engine, service.model)
    response.headers[HEADER] = header_value(record)
    if isinstance(response, StreamingResponse):
        response.body_iterator = add_to_stream(aiter(response.body_iterator), block)
    elif isinstance(response, JSONResponse):
        content = json.loads(bytes(response.body))
        content["usage"]["pruning"] = block()
        response.body = response.render(content)
        response.headers["content-length"] = str(len(response.body))
