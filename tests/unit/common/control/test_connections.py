"""Connections that never complete a request, on real sockets."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import psutil
import pytest
from prometheus_client import CollectorRegistry

from palimpsest.common.control.guard import RequestLimits
from palimpsest.common.service import Server, application
from tests.processes.waiting import until

HOST = "127.0.0.1"
GENEROUS_S = 60.0
HALF_OPEN = 200
"""Number of connections at once. `python -m tests.soak.half_open` opens 2,000."""
REQUEST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


def serving(limits: RequestLimits) -> Server:
    app = application("thing", registry=CollectorRegistry(), ready=lambda: None, status=dict, limits=limits)
    return Server(app, HOST, 0, key="thing", limits=limits)


@pytest.fixture(scope="module")
def impatient() -> Iterator[Server]:
    with serving(RequestLimits(header_s=0.05, keep_alive_s=0.05)) as server:
        yield server


def received(connection: socket.socket) -> bytes:
    """Everything that the server sends until it closes the connection."""
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def connect(server: Server) -> socket.socket:
    return socket.create_connection((HOST, server.port), timeout=GENEROUS_S)


def descriptors(server: Server) -> int:
    """Number of file descriptors of this process that belong to connections of this server, at the server's end."""
    ends = psutil.Process().net_connections("tcp")
    return sum(end.laddr.port == server.port and end.status != psutil.CONN_LISTEN for end in ends)


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nHost: lo", REQUEST[:-2]])
def test_a_half_open_connection_is_closed_after_the_limit(impatient: Server, sent: bytes) -> None:
    with connect(impatient) as connection:
        connection.sendall(sent)
        assert received(connection) == b""


def test_half_a_request_after_a_whole_one_is_closed_after_the_limit(impatient: Server) -> None:
    def ends_after_one_reply() -> bool:
        with connect(impatient) as connection:
            connection.sendall(REQUEST + REQUEST[:9])
            return received(connection).count(b"HTTP/1.1 200") == 1

    until(ends_after_one_reply)  # a busy machine may send it only after the limit


def test_whole_requests_share_a_connection() -> None:
    with serving(RequestLimits(header_s=GENEROUS_S)) as server, connect(server) as connection:
        for _ in range(3):
            connection.sendall(REQUEST)
            reply = b""
            while not reply.endswith(b'{"service":"thing"}'):
                reply += connection.recv(65536)


def test_headers_without_an_end_are_refused_at_the_limit() -> None:
    with serving(RequestLimits(header_s=GENEROUS_S, header_bytes=10_000)) as server, connect(server) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 12_000)
        head, _, body = received(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert json.loads(body)["code"] == "headers_too_large"


def test_the_file_descriptors_of_half_open_connections_come_back() -> None:
    """Each connection holds one; at the limit of the process no request would be answered any more."""
    with serving(RequestLimits(header_s=GENEROUS_S)) as patient, connect(patient):
        until(lambda: descriptors(patient) == 1)
    with serving(RequestLimits(header_s=0.5)) as server, ExitStack() as stack:
        held = [stack.enter_context(connect(server)) for _ in range(HALF_OPEN)]
        for connection in held:
            connection.sendall(REQUEST[:-2])
        assert all(received(connection) == b"" for connection in held)
        until(lambda: descriptors(server) == 0)
        until(lambda: answered(server))  # a busy machine may send it only after the limit


def answered(server: Server) -> bool:
    """Whether the server answers a whole request."""
    with connect(server) as connection, suppress(ConnectionError):
        connection.sendall(REQUEST)
        return connection.recv(65536).startswith(b"HTTP/1.1 200")
    return False
