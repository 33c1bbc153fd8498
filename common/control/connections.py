"""The HTTP connection of uvicorn, with limits for the headers of a request in size and time.

uvicorn limits the time between two requests only: a client that sends half a header holds its connection for ever.
The class works on both parsers of uvicorn, because it looks only at `cycle`, which both set at the end of the headers.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from palimpsest.common.control.guard import RequestLimits, headers_too_large


def limited_protocol(limits: RequestLimits) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with these limits."""

    class LimitedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        """A connection that is closed if the headers of a request take too long or are too large."""

        _timer: asyncio.TimerHandle | None = None
        _arrived = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start_timer(limits.header_s)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            if before is None or before.response_complete or not before.more_body:  # not a part of a body
                if not self._arrived:
                    self._start_timer(limits.header_s)
                self._arrived += len(data)
            super().data_received(data)
            if self.cycle is not before:  # the headers are complete
                self._stop_timer()
                self._arrived = 0
            elif self._arrived > limits.header_bytes:
                self._refuse()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete:  # the parser may hold the begin of another request
                self._start_timer(limits.keep_alive_s)

        def _start_timer(self, limit_s: float) -> None:
            self._stop_timer()
            self._timer = asyncio.get_running_loop().call_later(limit_s, self._on_timeout)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _on_timeout(self) -> None:
            self._timer = None
            self.transport.abort()

        def _refuse(self) -> None:
            self._stop_timer()
            error = headers_too_large(limits.header_bytes)
            body = json.dumps(error.body).encode()
            head = (
                f"HTTP/1.1 {error.status} Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self.transport.close()

    return LimitedProtocol
