"""A network between a client and a server that the test can part: connections stay open, and no byte arrives.

A killed server refuses or resets connections; a parted network does neither, so clients see only silence.
"""

import socket
import struct
import threading
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Self

READ = 65536


class PartedNetwork:
    """A TCP proxy. `to`: the server; None: SOCKS5, each client names its server. Use as a context manager."""

    def __init__(self, to: tuple[str, int] | None = None) -> None:
        self._to = to
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._requests, self._replies = threading.Event(), threading.Event()
        self._sockets: list[socket.socket] = []
        self.held = threading.Event()
        """Set when a byte was held back since the last cut."""
        self.heal()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *, replies_only: bool = False) -> None:
        """Part the network; with replies_only in one direction, so that the server sees the requests."""
        self.held.clear()
        self._replies.clear()
        if not replies_only:
            self._requests.clear()

    def heal(self, *, reset: bool = False) -> None:
        """Join the network. What was held back arrives; with reset it is lost with all its connections."""
        if reset:
            self._close()
        self._requests.set()
        self._replies.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.close()
        self._close()
        self.heal()

    def _close(self) -> None:
        sockets, self._sockets = self._sockets, []
        for one in sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):  # the test is over
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with ExitStack() as stack, suppress(OSError):
            stack.enter_context(client)
            self._requests.wait()
            server = stack.enter_context(socket.create_connection(self._to or _asked(client)))
            if self._to is None:
                client.sendall(b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
            self._sockets += [client, server]
            back = threading.Thread(target=self._pump, args=(server, client, self._replies), daemon=True)
            back.start()
            self._pump(client, server, self._requests)
            back.join()

    def _pump(self, source: socket.socket, target: socket.socket, joined: threading.Event) -> None:
        with suppress(OSError):
            while data := source.recv(READ):
                if not joined.is_set():
                    self.held.set()
                    joined.wait()
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def _asked(client: socket.socket) -> tuple[str, int]:
    """The server that a SOCKS5 client asks for (RFC 1928), by IPv4 address or name, without authentication."""
    _, methods = _exactly(client, 2)
    _exactly(client, methods)
    client.sendall(b"\x05\x00")
    kind = _exactly(client, 4)[3]
    host = socket.inet_ntoa(_exactly(client, 4)) if kind == 1 else _exactly(client, _exactly(client, 1)[0]).decode()
    return host, struct.unpack(">H", _exactly(client, 2))[0]


def _exactly(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        if not (part := client.recv(count - len(data))):
            raise OSError("the client left")
        data += part
    return data
