"""The OpenAPI document of a service: schemas of msgspec bodies, and the roles that each route needs."""

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from palimpsest.common.control.access import COMMON_RULES, METRICS, OPEN, Access, AccessRule, needed_roles

SCHEME = "bearer"
_REF = "#/components/schemas/{name}"


def json_body(app: FastAPI, kind: type) -> dict[str, Any]:
    """Return the `openapi_extra` of a route that decodes its body to this msgspec struct."""
    return {"requestBody": {"required": True, "content": json_content(app, kind)}}


def json_content(app: FastAPI, kind: type) -> dict[str, Any]:
    """Return the `content` of a JSON body with the schema of this msgspec struct."""
    (reference,), schemas = msgspec.json.schema_components([kind], ref_template=_REF)
    _structs(app).update(schemas)
    return {"application/json": {"schema": reference}}


def bytes_content() -> dict[str, Any]:
    """Return the `content` of a body of any bytes."""
    return {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


def describe(app: FastAPI, access: Access | None, rules: Sequence[AccessRule]) -> None:
    """Let the application's document have the schemas of its structs, and the role that each route needs.

    The document requires a token only where the service does.
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(
                title=app.title, version=app.version, routes=app.routes, separate_input_output_schemas=False
            )
            components = found.setdefault("components", {})
            components.setdefault("schemas", {}).update(_structs(app))
            components["securitySchemes"] = {
                SCHEME: {"type": "http", "scheme": "bearer", "description": "A token; docs/operations.md, Access"}
            }
            for path, methods in found["paths"].items():
                for method, operation in methods.items():
                    if roles := _roles(access, method.upper(), path, rules):
                        operation["security"] = [{SCHEME: [role]} for role in roles]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI documents this way to extend the document


def _roles(access: Access | None, method: str, path: str, rules: Sequence[AccessRule]) -> tuple[str, ...]:
    """Return the roles of which the service requires one; none if it answers everybody."""
    if access is None or path in OPEN:
        return ()
    if path == METRICS:
        return () if access.metrics is None else ("view",)
    if access.tokens is None:
        return ()
    return tuple(needed_roles(method, path, (*rules, *COMMON_RULES)))


def _structs(app: FastAPI) -> dict[str, Any]:
    if not hasattr(app.state, "structs"):
        app.state.structs = {}
    found: dict[str, Any] = app.state.structs
    return found
