"""Sessions that reach the hosts of `env_gateway.child_hosts` and nothing else."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from palimpsest.common.config.env_gateway import AdapterConfig, EnvGatewayConfig
from palimpsest.common.environments.port import Reply, Turn
from palimpsest.common.user_error import UserError
from palimpsest.services.env_gateway import child_limits as the_limits
from palimpsest.services.env_gateway.adapters.mcp_tools import McpTools
from palimpsest.services.env_gateway.host_lists import permissions
from palimpsest.services.env_gateway.instruments import HOSTS_REFUSED
from palimpsest.services.env_gateway.processes.child_host import InChild
from palimpsest.services.env_gateway.processes.confinement import Available, ChildLimits
from palimpsest.services.env_gateway.processes.pool import Pool
from palimpsest.services.env_gateway.processes.protocol import EnvironmentSpec
from palimpsest.services.env_gateway.proxy import client
from palimpsest.services.env_gateway.proxy.addresses import PermittedHosts, read_head
from tests.processes.user_range import own_users
from tests.processes.waiting import LIMIT_S

FOLDER = Path(__file__).parent / "plugins"
LIMITS = ChildLimits(memory_mib=4096, processes=None, files=64, file_mib=8, user=own_users(), isolate=True)


@contextmanager
def server(text: str, redirect: str = "") -> Iterator[int]:
    """Serve this text on 127.0.0.1; `/redirect` leads to another URL. Yields the port."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if self.path == "/redirect" else 200)
            self.send_header("Location", redirect)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        try:
            yield serving.server_address[1]
        finally:
            serving.shutdown()
            thread.join()


def refused() -> float:
    return HOSTS_REFUSED.labels("wiki")._value.get()


@pytest.mark.servers
async def test_a_session_reaches_the_hosts_of_its_list_and_no_url_widens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    with ExitStack() as stack:
        other = stack.enter_context(server("secret"))
        allowed = stack.enter_context(server("hello", redirect=f"http://127.0.0.1:{other}/"))
        spec = EnvironmentSpec(
            path="hostile:Fetches",
            hosts=PermittedHosts(environment="wiki", addresses=(f"127.0.0.1:{allowed}",)),
        )
        pool = Pool(limit=20, wait_s=0.2, call_limit_s=100.0, modules=("hostile",), limits=LIMITS)

        async def opened(text: str, blueprint: EnvironmentSpec) -> str:
            host = await InChild.open(pool, blueprint)
            await host.reset(0)
            reply = await host.step(Turn(text))
            host.close()
            assert isinstance(reply, Reply)
            return reply.messages[0].content

        texts = [
            f"http://127.0.0.1:{allowed}/",
            f"as secret.example http://127.0.0.1:{allowed}/",
            f"tunnel 127.0.0.1 {allowed}",
            f"http://127.0.0.1:{other}/",
            f"http://127.0.0.1:{allowed}@127.0.0.1:{other}/",
            f"http://127.0.0.1:{allowed}/redirect",
            f"http://localhost:{allowed}/",
            f"tunnel 127.0.0.1 {other}",
            f"direct 127.0.0.1 {allowed}",
        ]
        before = refused()
        try:
            assert pool.describe(spec).problem == ""
            answers = await asyncio.gather(*(opened(text, spec) for text in texts))
            without = await opened(f"direct 127.0.0.1 {allowed}", spec.model_copy(update={"hosts": None}))
            network = await opened(
                f"direct 127.0.0.1 {allowed}", spec.model_copy(update={"hosts": None, "network": True})
            )
            async with asyncio.timeout(LIMIT_S):
                while pool._proxy._served:  # the sockets of a session are closed after it
                    await asyncio.sleep(0.01)
        finally:
            await pool.close()
    no = f"403 env_gateway.child_hosts.wiki does not name {{}}; it names 127.0.0.1:{allowed}\n"
    disagreement = f"the Host header names 'secret.example', but the URL 127.0.0.1:{allowed}"
    assert answers == [
        "hello",
        f"400 the proxy of the gateway: {disagreement}; they must be the same\n",
        "hello",
        no.format(f"127.0.0.1:{other}"),
        no.format(f"127.0.0.1:{other}"),
        no.format(f"127.0.0.1:{other}"),
        no.format(f"localhost:{allowed}"),
        "Tunnel connection failed: 403 Forbidden",
        "[Errno 111] Connection refused",
    ]
    assert (without, network) == ("[Errno 111] Connection refused", "connected")
    assert refused() - before == 5


@pytest.mark.parametrize(
    ("url", "headers", "problem"),
    [
        ("http://a.org/", "Host: A.org.", ""),
        ("http://a.org/", "Host: a.org:80", ""),
        ("http://[::1]/", "Host: [::1]", ""),
        ("http://a.org:81/", "Host: a.org", "'a.org', but the URL a.org:81"),
        ("http://a.org/", "Host: a.org\r\nhost : b.org", "'b.org'"),
        ("http://a.org/", "Host: a.org, b.org", "'a.org, b.org'"),
        ("http://a.org/", "Host: ", "''"),
    ],
)
def test_a_request_in_the_name_of_another_host_is_refused(url: str, headers: str, problem: str) -> None:
    found = read_head(f"GET {url} HTTP/1.1\r\n{headers}\r\n\r\n".encode()).contradiction()
    assert found is None if not problem else found is not None and f"the Host header names {problem}" in found


@pytest.mark.parametrize("headers", ["X: y\nHost: b.org", "X: y\r\n Host: b.org"])
def test_a_header_that_a_server_may_read_as_two_is_refused(headers: str) -> None:
    with pytest.raises(ValueError, match="not one line"):
        read_head(f"GET http://a.org/ HTTP/1.1\r\n{headers}\r\n\r\n".encode())


def test_the_server_of_an_mcp_adapter_gets_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package passes no variables of the process on."""
    config = AdapterConfig(kind="mcp", command=("server", "--fast"), tasks="m:C")
    assert McpTools(config.model_dump_json())._target("").env == {}
    monkeypatch.setitem(client._variables, "https_proxy", "http://127.0.0.1:1")
    target = McpTools(config.model_dump_json())._target("")
    assert (target.command, target.args, target.env) == ("server", ["--fast"], {"https_proxy": "http://127.0.0.1:1"})


def test_the_lists_become_permissions_of_environments() -> None:
    found = permissions(
        EnvGatewayConfig(
            plugins={"wiki": "m:C", "all": "m:C", "none": "m:C"},
            adapters={"remote": AdapterConfig(kind="ors", url="http://a"), "local": AdapterConfig(kind="mcp")},
            child_network=("all",),
            child_hosts={"wiki": ("API.example.org.:443", "[::1]:80")},
        )
    )
    assert {name for name, one in found.items() if one.network} == {"all", "remote"}
    assert {name: one.hosts.addresses for name, one in found.items() if one.hosts} == {
        "wiki": ("api.example.org:443", "[::1]:80")
    }


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"child_hosts": {"absent": ("a:1",)}}, r"child_hosts: there is no plugin or adapter 'absent'"),
        ({"child_network": ("absent",)}, r"child_network: there is no plugin or adapter 'absent'"),
        ({"child_hosts": {"wiki": ("a:1",)}, "child_network": ("wiki",)}, r"child_hosts.wiki: .* remove one"),
        ({"child_hosts": {"remote": ("a:1",)}}, r"child_hosts.remote: an adapter with a url"),
        ({"child_hosts": {"wiki": ()}}, r"child_hosts.wiki: it names no host"),
        ({"child_hosts": {"wiki": ("https://a.org",)}}, r"child_hosts.wiki: 'https://a.org' is not of the form"),
        ({"child_hosts": {"wiki": ("a:70000",)}}, r"child_hosts.wiki: 'a:70000' is not of the form"),
    ],
)
def test_a_wrong_list_is_refused_with_its_key(keys: dict[str, object], problem: str) -> None:
    config = EnvGatewayConfig.model_validate(
        {"plugins": {"wiki": "m:C"}, "adapters": {"remote": {"kind": "ors", "url": "http://a"}}, **keys}
    )
    with pytest.raises(UserError, match=problem):
        permissions(config)


def test_lists_of_hosts_need_a_network_that_can_be_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(the_limits, "available", lambda user: Available(False, False, "no namespace can be made"))
    with pytest.raises(UserError, match="child_hosts: no namespace can be made, so the network cannot be taken"):
        the_limits.child_limits(EnvGatewayConfig(plugins={"wiki": "m:C"}, child_hosts={"wiki": ("a:1",)}))
