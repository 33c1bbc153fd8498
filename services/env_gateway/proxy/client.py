"""The session's side of the proxy: opens a socket in its own network and gives it to the gateway."""

import os
import socket

PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_GIVEN = b"listening"
_variables: dict[str, str] = {}


def use_proxy(handover: socket.socket) -> None:
    """Let this process and its later children use the gateway's proxy. Call it in the network of the session."""
    with handover, socket.create_server(("127.0.0.1", 0)) as listening:
        socket.send_fds(handover, [_GIVEN], [listening.fileno()])
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    _variables.update({spelled: url for name in PROXIES for spelled in (name, name.upper())})
    os.environ.update(_variables)
    for name in ("no_proxy", "NO_PROXY"):
        os.environ.pop(name, None)


def proxy_variables() -> dict[str, str]:
    """Return the variables that name the proxy, for programs that inherit none; empty without a proxy."""
    return dict(_variables)


def received(handover: socket.socket) -> socket.socket:
    """Return the listening socket of the session. Blocks for at most the socket's timeout. Raises OSError."""
    message, descriptors, _, _ = socket.recv_fds(handover, len(_GIVEN), 1)
    if message != _GIVEN or not descriptors:
        raise ConnectionResetError("the session's process ended before it gave its socket")
    return socket.socket(fileno=descriptors[0])
