"""Connections to MCP servers over streamable HTTP, with a TLS context that is made once, as in http_client.py."""

import contextlib
from collections.abc import AsyncIterator
from importlib import import_module
from typing import Any

from mcp.client.streamable_http import streamable_http_client

_CLIENTS: Any = import_module("httpx2")
"""The client library that `mcp` depends on."""
TLS = _CLIENTS.create_ssl_context()
LIMITS = _CLIENTS.Timeout(30.0, read=300.0)
"""In seconds; a server may hold the stream of a reply open."""


@contextlib.asynccontextmanager
async def over_http(url: str, token: str) -> AsyncIterator[Any]:
    """Connect to a server; `token`: a bearer token, empty for none."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with (
        _CLIENTS.AsyncClient(headers=headers, timeout=LIMITS, verify=TLS) as http,
        streamable_http_client(url, http_client=http) as streams,
    ):
        yield streams
