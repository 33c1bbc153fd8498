"""A real control plane of Kubernetes on this machine: etcd, API server, controllers, scheduler. It has no nodes.

Everything listens on 127.0.0.1. `tests/servers/fake_nodes.py` plays the nodes.
"""

import contextlib
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.servers import control_plane_keys as keys
from tools.backends import downloads, ports
from tools.backends.process import Server

ADMIN, CONTROLLERS, SCHEDULER = "admin", "system:kube-controller-manager", "system:kube-scheduler"


class Etcd(Server):
    """The database of the API server. It does not sync its files: a test never needs them after a power failure."""

    title = "etcd"

    def prepare(self) -> None:
        """It needs no files."""

    def command(self) -> list[str]:
        """Return the command line."""
        peer, url = f"http://{ports.HOST}:{ports.free(self.port)}", f"http://{ports.HOST}:{self.port}"
        return [
            str(downloads.etcd()), "--unsafe-no-fsync", "--log-level=warn", "--data-dir=data",
            f"--listen-client-urls={url}", f"--advertise-client-urls={url}", f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}",
        ]  # fmt: skip

    def answers(self) -> bool:
        """Return whether it is healthy."""
        return _healthy(f"http://{ports.HOST}:{self.port}/health")


class KubernetesServer(Server):
    """A server of the program that `downloads.kubernetes` returns."""

    def __init__(self, folder: Path, name: str, *flags: str) -> None:
        super().__init__(folder, None)
        self.title, self._flags = name, flags

    def prepare(self) -> None:
        """Its keys are written before."""

    def command(self) -> list[str]:
        """Return the command line."""
        secure = [f"--bind-address={ports.HOST}", f"--secure-port={self.port}", "--v=0"]
        return [str(downloads.kubernetes()), self.title, *secure, *self._flags]

    def answers(self) -> bool:
        """Return whether it is ready."""
        path = "readyz" if self.title == "kube-apiserver" else "healthz"
        return _healthy(f"https://{ports.HOST}:{self.port}/{path}")


class ControlPlane:
    """A running control plane."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self.url = f"https://{ports.HOST}:{port}"
        """Address of the API server."""

    def kubeconfig(self, user: str = ADMIN) -> Path:
        """Return the path of a configuration for clients that gives this user's certificate."""
        path = self._folder / f"{user}.kubeconfig"
        certificate = keys.client(self._folder, user)
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "test", "cluster": {"server": self.url, "certificate-authority": str(keys.ca(self._folder))}}
            ],
            "users": [
                {
                    "name": user,
                    "user": {
                        "client-certificate": str(certificate),
                        "client-key": str(certificate.with_suffix(".key")),
                    },
                }
            ],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
            "current-context": "test",
        }
        path.write_text(yaml.safe_dump(content))
        return path

    def client(self) -> httpx.Client:
        """Return an HTTP client of an administrator."""
        context = ssl.create_default_context(cafile=str(keys.ca(self._folder)))
        certificate = keys.client(self._folder, ADMIN)
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        return httpx.Client(base_url=self.url, verify=context, timeout=120.0)


@contextmanager
def running(folder: Path) -> Iterator[ControlPlane]:
    """Start the servers and stop them at the end of the block."""
    keys.make(folder, [(ADMIN, "system:masters"), (CONTROLLERS, "system:masters"), (SCHEDULER, "system:masters")])
    ca, server, accounts = keys.ca(folder), keys.server(folder), folder / "server.key"
    with ExitStack() as stack:
        etcd = _started(stack, Etcd(folder / "etcd", None))
        api = _started(
            stack,
            KubernetesServer(
                folder / "api", "kube-apiserver", f"--etcd-servers=http://{ports.HOST}:{etcd.port}",
                f"--tls-cert-file={server}", f"--tls-private-key-file={server.with_suffix('.key')}",
                f"--client-ca-file={ca}", "--authorization-mode=RBAC", "--service-cluster-ip-range=10.96.0.0/16",
                "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={accounts}",
                f"--service-account-signing-key-file={accounts}", "--endpoint-reconciler-type=none",
                "--feature-gates=SizeBasedListCostEstimate=false",  # it needs a newer etcd
            ),
        )  # fmt: skip
        plane = ControlPlane(folder, api.port)
        for name, user, flags in (
            ("kube-controller-manager", CONTROLLERS,
             (f"--service-account-private-key-file={accounts}", f"--root-ca-file={ca}",
              "--node-monitor-grace-period=24h")),
            ("kube-scheduler", SCHEDULER, ()),
        ):  # fmt: skip
            config = f"--kubeconfig={plane.kubeconfig(user)}"
            _started(stack, KubernetesServer(folder / name, name, config, "--leader-elect=false", *flags))
        yield plane


def _started(stack: ExitStack, server: Any) -> Any:
    """Start a server and kill it at the end: an API server that gets SIGTERM holds its port for a minute."""
    server.start(limit_s=300.0)
    stack.callback(server.kill)
    return server


def _healthy(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, verify=False, timeout=2.0).is_success
    return False
