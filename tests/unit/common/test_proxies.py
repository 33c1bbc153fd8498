"""Which requests use the proxy of the environment."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest

from palimpsest.common.proxies import outside_client, outside_pool, proxy_of
from palimpsest.common.snapshots.retrying_http import RetryingHttp
from palimpsest.common.tls import tls_context


@pytest.fixture
def asked() -> Iterator[list[str]]:
    """Start a proxy; the targets of the requests that it gets."""
    targets: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            targets.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Proxy) as server, pytest.MonkeyPatch.context() as patch:
        for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTP_PROXY"):
            patch.delenv(name, raising=False)
        patch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield targets
        server.shutdown()
        thread.join()


def test_requests_to_another_machine_use_the_proxy(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with outside_client(tls_context(None, key="")) as client:
        assert client.get("http://s3.example/bucket").status_code == 200
    assert outside_pool("http://s3.example").request("GET", "http://s3.example/key").status == 200
    assert asked == ["http://s3.example/bucket", "http://s3.example/key"]
    monkeypatch.setenv("no_proxy", ".example")
    assert proxy_of("http://s3.example") is None


def test_requests_to_this_machine_and_to_our_services_use_no_proxy(asked: list[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # it does not listen
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with outside_client(tls_context(None, key="")) as client, pytest.raises(httpx.ConnectError):
            client.get(url)
        assert proxy_of(url) is proxy_of("https://[::1]:9000") is None
    store = RetryingHttp("http://store.invalid", patience_s=0.0, sleep=lambda _: None)
    with pytest.raises(Exception, match="did not answer"):
        store.call(lambda http: http.get("/v1/writers"))
    store.close()
    assert asked == []
