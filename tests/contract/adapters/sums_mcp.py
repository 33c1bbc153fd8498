"""An MCP server over stdio for tests: `add` counts up, `crash` ends the process."""

import os

from mcp.server import MCPServer

server = MCPServer("sums")
total = 0


@server.tool()
def add(number: int) -> str:
    """Add a number."""
    global total
    total += number
    if number < 0:
        raise ValueError("only positive numbers")
    return str(total)


@server.tool()
def crash() -> str:
    """End the server."""
    os._exit(3)


if __name__ == "__main__":
    server.run()
