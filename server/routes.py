"""What we add to vLLM's server: the listing, the field in the OpenAPI schema, and the doors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from tokenprune.request import FLAT_PRESET, PruningField
from tokenprune.server.doors import DOORS, PruningDoors
from tokenprune.server.listing import policies_listing
from tokenprune.server.service import Service

_DESCRIPTION = (
    "What to prune for this request: a preset's name or an object with one method per axis; 'off' "
    "turns the server's default off. See GET /v1/pruning/policies."
)


async def list_policies(raw_request: Request) -> dict[str, Any]:
    """List pruning policies with their parameters, the presets, and what this engine allows."""
    service: Service = raw_request.app.state.tokenprune
    return policies_listing(service.engine, service.default)


def attach_routes(app: FastAPI) -> None:
    """Add the listing, and read the field on every route that reaches the engine."""
    paths = {route.path for route in app.routes if isinstance(route, APIRoute)}
    app.add_api_route("/v1/pruning/policies", list_policies, methods=["GET"])
    app.add_middleware(PruningDoors, doors=DOORS & paths)
    schema_of_routes = app.openapi

    def openapi() -> dict[str, Any]:
        # FastAPI makes it once and keeps it
        is_new = app.openapi_schema is None
        schema = schema_of_routes()
        if is_new:
            _show_field(schema, DOORS)
        return schema

    # as FastAPI's own pages say a schema is to be extended
    app.openapi = openapi  # type: ignore[method-assign]


def _show_field(schema: dict[str, Any], doors: frozenset[str]) -> None:
    """Add the field to the body of every route that reads it."""
    template = "#/components/schemas/{model}"
    field = TypeAdapter(PruningField | None).json_schema(ref_template=template)
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(field.pop("$defs"))
    field |= {"title": "Pruning", "description": _DESCRIPTION}
    for path in doors & schema["paths"].keys():
        content = schema["paths"][path]["post"].get("requestBody", {}).get("content", {})
        name = content.get("application/json", {}).get("schema", {}).get("$ref", "")
        if name:
            schemas[name.rsplit("/", 1)[-1]]["properties"][FLAT_PRESET] = field
