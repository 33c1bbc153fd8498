"""Requests and replies of JSON-RPC 2.0, as MCP and OpenEnv use them. Pure."""

from collections.abc import Mapping
from typing import Any

INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, INTERNAL = -32600, -32601, -32602, -32603


class RpcError(Exception):
    """An error that the client gets."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def request_of(message: Any) -> tuple[str, Mapping[str, Any]]:
    """Return method and parameters. Raises RpcError."""
    if not isinstance(message, Mapping) or not isinstance(message.get("method"), str):
        raise RpcError(INVALID_REQUEST, "a request is an object with `method`")
    params = message.get("params") or {}
    if not isinstance(params, Mapping):
        raise RpcError(INVALID_PARAMS, "`params` is an object")
    return message["method"], params


def reply(message: Any, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reply to a request."""
    return {"jsonrpc": "2.0", "id": message.get("id"), "result": dict(result)}


def failure(message: Any, error: RpcError) -> dict[str, Any]:
    """Return the error reply to a request."""
    number = message.get("id") if isinstance(message, Mapping) else None
    return {"jsonrpc": "2.0", "id": number, "error": {"code": error.code, "message": str(error)}}


def call_of(params: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return tool and arguments of `tools/call`. Raises RpcError."""
    name, arguments = params.get("name"), params.get("arguments") or {}
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise RpcError(INVALID_PARAMS, "tools/call needs `name` and an object `arguments`")
    return name, arguments
