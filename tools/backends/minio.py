"""A MinIO server with one process and one folder."""

import http.client
import ssl
from collections.abc import Mapping
from pathlib import Path

from tools.backends import downloads, ports, secret
from tools.backends.process import Server

USER = "palimpsest"
ANSWER_S = 1.0


class Minio(Server):
    """An S3 server on 127.0.0.1, with `access_key` and `secret_key`. TLS: `ca_file` signs its certificate."""

    title = "MinIO"

    def __init__(self, folder: Path, *, port: int | None = None, tls: bool = False, detached: bool = False) -> None:
        super().__init__(folder, port, detached=detached)
        self.tls = tls
        self.certificates = self.folder / "certificates"
        if tls:
            from tools.backends import certificates  # only with TLS: the import takes time

            certificates.make(self.certificates)

    @property
    def endpoint(self) -> str:
        """URL for clients."""
        scheme = "https" if self.tls else "http"
        return f"{scheme}://{ports.HOST}:{self.port}"

    @property
    def access_key(self) -> str:
        """Name of the user."""
        return USER

    @property
    def secret_key(self) -> str:
        """Password of the user."""
        return secret.kept(self.folder / "password")

    @property
    def ca_file(self) -> Path:
        """The authority that signed the server's certificate (PEM)."""
        return self.certificates / "ca.pem"

    def prepare(self) -> None:
        """Copy the certificate to the folder that MinIO reads. With an empty folder, MinIO uses no TLS."""
        served = self.folder / "served"
        served.mkdir(exist_ok=True)
        (self.folder / "data").mkdir(exist_ok=True)
        if self.tls:
            (served / "public.crt").write_bytes((self.certificates / "server.pem").read_bytes())
            private = served / "private.key"
            private.touch(mode=0o600)
            private.write_bytes((self.certificates / "server.key").read_bytes())

    def command(self) -> list[str]:
        """See process.py."""
        return [
            str(downloads.minio()),
            "server",
            "--quiet",
            "--address",
            f"{ports.HOST}:{self.port}",
            "--certs-dir",
            str(self.folder / "served"),
            str(self.folder / "data"),
        ]

    def environment(self) -> Mapping[str, str]:
        """Return the credentials, and settings that disable the console and the update check."""
        return {
            "MINIO_ROOT_USER": self.access_key,
            "MINIO_ROOT_PASSWORD": self.secret_key,
            "MINIO_BROWSER": "off",
            "MINIO_UPDATE": "off",
        }

    def answers(self) -> bool:
        """Return whether objects and users are available. /minio/health/ready answers before users are loaded."""
        connection = self._connection()
        try:
            connection.request("GET", "/minio/health/cluster")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self.tls:
            context = ssl.create_default_context(cafile=self.ca_file)
            return http.client.HTTPSConnection(ports.HOST, self.port, timeout=ANSWER_S, context=context)
        return http.client.HTTPConnection(ports.HOST, self.port, timeout=ANSWER_S)
