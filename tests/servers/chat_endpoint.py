"""An OpenAI-compatible endpoint on a thread, whose replies a test writes."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass(frozen=True)
class Answer:
    """One reply of the endpoint."""

    body: bytes = b""
    status: int = 200
    hangs: bool = False
    """The reply never ends: one byte each 50 ms until the server closes."""


def spoken(
    text: str | None, *, usage: dict[str, Any] | None = None, calls: tuple[tuple[str, dict[str, Any]], ...] = ()
) -> Answer:
    """Return the reply with a message of the model. usage: None for a reply that reports none."""
    made = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for i, (name, arguments) in enumerate(calls)
    ]
    message = {"role": "assistant", "content": text, **({"tool_calls": made} if made else {})}
    choice = {"index": 0, "finish_reason": "tool_calls" if made else "stop", "message": message}
    reply: dict[str, Any] = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return Answer(json.dumps(reply | ({"usage": usage} if usage is not None else {})).encode())


@dataclass
class ChatEndpoint:
    """Answers POST /v1/chat/completions with `answer(request)`."""

    answer: Callable[[dict[str, Any]], Answer]
    requests: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    """Header `Authorization` of each request."""

    def __enter__(self) -> Self:
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._exchange())
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _exchange(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Exchange(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(request)
                endpoint.tokens.append(self.headers["Authorization"])
                if self.path != "/v1/chat/completions":
                    self.send_error(404)
                    return
                answer = endpoint.answer(request)
                self.send_response(answer.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(10**6 if answer.hangs else len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)
                while answer.hangs and not endpoint._closing.wait(0.05):
                    try:
                        self.wfile.write(b" ")
                    except OSError:  # the client has gone
                        return

            def log_message(self, *_: object) -> None: ...

        return Exchange
