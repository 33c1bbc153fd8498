"""An OpenAI-compatible endpoint that answers yes: `python -m bench.gateway.chat_server PORT`."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPLY = json.dumps(
    {
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1},
    }
).encode()


class Exchange(BaseHTTPRequestHandler):
    """Answers each request with the same reply."""

    def do_GET(self) -> None:
        """Answer the check that the server runs."""
        self._reply()

    def do_POST(self) -> None:
        """Answer a request of a chat."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self._reply()

    def log_message(self, *_: object) -> None:
        """Write no log."""

    def _reply(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(REPLY)))
        self.end_headers()
        self.wfile.write(REPLY)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Exchange).serve_forever()
