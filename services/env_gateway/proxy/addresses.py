"""Addresses `host:port` in one form, and the head of a request to the proxy. Pure."""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from palimpsest.common.sessions.wire import Wire

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+):(\d{1,5})", re.ASCII)
_HOP = ("connection", "keep-alive", "proxy-", "te:", "upgrade:")
"""Beginnings of headers that are not passed on."""


class PermittedHosts(Wire):
    """What the sessions of an environment may reach."""

    environment: str
    addresses: tuple[str, ...]
    """In the form of `address`."""


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a request to the proxy."""

    address: str
    """In the form of `address`."""
    forward: bytes | None
    """Head of the request to the server; None for a tunnel."""
    claims: tuple[str, ...] = ()
    """Values of its Host headers."""

    def contradiction(self) -> str | None:
        """Return how a Host header contradicts the URL, or None. A server answers for the host that the header names.

        >>> Head("a.org:80", b"", ("b.org",)).contradiction()
        "the Host header names 'b.org', but the URL a.org:80; they must be the same"
        """
        for claim in self.claims:
            try:
                named = address(claim if claim.rpartition(":")[2].isdigit() else f"{claim}:80")
            except ValueError:
                named = ""
            if named != self.address:
                return f"the Host header names {claim[:200]!r}, but the URL {self.address}; they must be the same"
        return None


def address(text: str) -> str:
    """Return the address with a lower-case host, without the final dot of a name. Raises ValueError.

    >>> address("API.example.org.:0443")
    'api.example.org:443'
    """
    found = _ADDRESS.fullmatch(text)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ValueError(f"{text[:200]!r} is not of the form host:port")
    return f"{found[1].lower().rstrip('.')}:{int(found[2])}"


def split(checked: str) -> tuple[str, int]:
    """Return host and port of an address, for a connection.

    >>> split("[::1]:80")
    ('::1', 80)
    """
    host, _, port = checked.rpartition(":")
    return host.strip("[]"), int(port)


def read_head(head: bytes) -> Head:
    """Read the head of a request, with its final empty line. Raises ValueError.

    >>> read_head(b"CONNECT example.org:443 HTTP/1.1\\r\\n\\r\\n")
    Head(address='example.org:443', forward=None, claims=())
    >>> read_head(b"GET http://example.org/a?b HTTP/1.1\\r\\nProxy-Authorization: x\\r\\n\\r\\n").forward
    b'GET /a?b HTTP/1.1\\r\\nConnection: close\\r\\n\\r\\n'
    """
    first, *headers = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or words[2] not in ("HTTP/1.0", "HTTP/1.1"):
        raise ValueError("it is not a request of HTTP/1.1")
    method, target, version = words
    if any("\r" in line or "\n" in line or line[:1] in (" ", "\t") for line in headers):
        raise ValueError("a header is not one line that ends in CR LF")
    if method == "CONNECT":
        return Head(address(target), None)
    parts = urlsplit(target)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{target[:200]!r} is not a URL of http, and not a tunnel")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    reached = address(f"{host}:{parts.port or 80}")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    kept = [line for line in headers if not line.lower().startswith(_HOP)]
    lines = [f"{method} {path} {version}", *kept, "Connection: close", "", ""]
    named = [
        value.strip() for name, _, value in (line.partition(":") for line in kept) if name.strip().lower() == "host"
    ]
    return Head(reached, "\r\n".join(lines).encode("latin-1"), tuple(named))
