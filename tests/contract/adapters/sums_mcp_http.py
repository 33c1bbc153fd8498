"""An MCP server over streamable HTTP for tests: `python sums_mcp_http.py PORT`. It takes only requests with a token.

All clients share the server, so `add` keeps no sum. `fail` reports an error.
"""

import sys

import uvicorn
from mcp.server import MCPServer
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

server = MCPServer("sums")


@server.tool()
def add(number: int) -> str:
    """Add a number."""
    if number < 0:
        raise ValueError("only positive numbers")
    return f"added {number}"


@server.custom_route("/sums/sessions_count", methods=["GET"])
async def count(_request: Request) -> Response:
    return JSONResponse(len(server.session_manager._server_instances))


app = server.streamable_http_app()


async def with_token(scope, receive, send):  # type: ignore[no-untyped-def]
    headers = dict(scope.get("headers", ()))
    if scope["type"] == "http" and scope["path"] == "/mcp" and headers.get(b"authorization") != b"Bearer of-the-test":
        await Response(status_code=401)(scope, receive, send)
        return
    await app(scope, receive, send)


if __name__ == "__main__":
    uvicorn.run(with_token, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
