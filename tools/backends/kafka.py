"""A Kafka server with broker and controller in one process (KRaft mode)."""

import shutil
import socket
import ssl
import struct
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from palimpsest.common.user_error import ExitCode, UserError
from tools.backends import downloads, ports, secret
from tools.backends.process import Server

Security = Literal["plaintext", "tls", "sasl_plaintext", "sasl_tls"]
PROTOCOLS: Mapping[Security, str] = {
    "plaintext": "PLAINTEXT",
    "tls": "SSL",
    "sasl_plaintext": "SASL_PLAINTEXT",
    "sasl_tls": "SASL_SSL",
}
USER = "palimpsest"
FAST_JVM = ("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Djava.awt.headless=true")
"""Options for a start in two seconds. They limit compilation, which slows a broker that runs for days."""
ANSWER_S = 1.0
API_VERSIONS = struct.pack(">hhih", 18, 0, 1, -1)
"""Request ApiVersions, valid before authentication: API key 18, version 0, correlation id 1, no client id."""


class Kafka(Server):
    """A broker on 127.0.0.1. It creates no topics automatically. The minimum session timeout of a group is 1 s.

    `security` selects the protocol of clients. TLS: `ca_file` signs its certificate; a client can present
    `certificate_file` with `key_file`, and must if `require_certificate`. SASL: `username` and `password`, with PLAIN,
    SCRAM-SHA-256 or SCRAM-SHA-512.
    """

    title = "Kafka"

    def __init__(
        self,
        folder: Path,
        *,
        port: int | None = None,
        security: Security = "plaintext",
        require_certificate: bool = False,
        detached: bool = False,
    ) -> None:
        super().__init__(folder, port, detached=detached)
        self.security: Security = security
        self.require_certificate = require_certificate
        self._internal = ports.free(self.port)
        self._controller = ports.free(self.port, self._internal)
        self.certificates = self.folder / "certificates"
        if self._tls:
            from tools.backends import certificates  # only with TLS: the import takes time

            certificates.make(self.certificates)

    @property
    def servers(self) -> str:
        """Bootstrap address for clients."""
        return f"{ports.HOST}:{self.port}"

    @property
    def username(self) -> str:
        """The only SASL user."""
        return USER

    @property
    def password(self) -> str:
        """That user's."""
        return secret.kept(self.folder / "password")

    @property
    def ca_file(self) -> Path:
        """The authority that signed the broker's certificate (PEM)."""
        return self.certificates / "ca.pem"

    @property
    def certificate_file(self) -> Path:
        """Certificate of a client (PEM)."""
        return self.certificates / "client.pem"

    @property
    def key_file(self) -> Path:
        """Private key of that client (PEM)."""
        return self.certificates / "client.key"

    def prepare(self) -> None:
        """Write the settings. Create the data folder atomically if it is missing."""
        data = self.folder / "data"
        if not data.exists():
            partial = self.folder / "data.partial"
            shutil.rmtree(partial, ignore_errors=True)
            self._format(self._write("format.properties", partial))
            partial.rename(data)
        self._write("server.properties", data)

    def command(self) -> list[str]:
        """See process.py."""
        return [*self._java(), "kafka.Kafka", str(self.folder / "server.properties")]

    def answers(self) -> bool:
        """Return whether the broker answers ApiVersions, which it does once it can lead partitions."""
        try:
            with self._connected() as connection, connection.makefile("rb") as answers:
                connection.sendall(struct.pack(">i", len(API_VERSIONS)) + API_VERSIONS)
                answer = answers.read(10)
        except OSError:  # refused, timed out, or TLS not ready
            return False
        return len(answer) == 10 and struct.unpack(">iih", answer)[1:] == (1, 0)

    def _connected(self) -> socket.socket:
        connection = socket.create_connection((ports.HOST, self.port), timeout=ANSWER_S)
        if not self._tls:
            return connection
        context = ssl.create_default_context(cafile=self.ca_file)
        context.load_cert_chain(self.certificate_file, self.key_file)
        try:
            return context.wrap_socket(connection, server_hostname=ports.HOST)
        except OSError:
            connection.close()
            raise

    def _java(self) -> list[str]:
        log4j = Path(__file__).with_name("log4j2.xml")
        return [downloads.java(), *FAST_JVM, f"-Dlog4j2.configurationFile={log4j}", "-cp", f"{downloads.kafka()}/*"]

    def _format(self, settings: Path) -> None:
        command = [*self._java(), "kafka.tools.StorageTool", "format", "-c", str(settings), "-t", uuid.uuid4().hex[:22]]
        for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512"):
            command += ["--add-scram", f"{mechanism}=[name={USER},password={self.password}]"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UserError(
                f"Kafka could not create its data folder in {self.folder}:\n{done.stdout}{done.stderr}",
                ExitCode.UNAVAILABLE,
            )

    @property
    def _tls(self) -> bool:
        return self.security in {"tls", "sasl_tls"}

    @property
    def _sasl(self) -> bool:
        return self.security in {"sasl_plaintext", "sasl_tls"}

    def _write(self, name: str, data: Path) -> Path:
        """Write the settings for this data folder. Only the owner can read them, because they contain the password."""
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text("".join(f"{key}={value}\n" for key, value in self._settings(data).items()))
        return path

    def _settings(self, data: Path) -> dict[str, str]:
        host, protocol = ports.HOST, PROTOCOLS[self.security]
        client, internal = f"CLIENT://{host}:{self.port}", f"INTERNAL://{host}:{self._internal}"
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "log.dirs": str(data),
            "controller.quorum.voters": f"1@{host}:{self._controller}",
            "listeners": f"{client},{internal},CONTROLLER://{host}:{self._controller}",
            "advertised.listeners": f"{client},{internal}",
            "listener.security.protocol.map": f"CLIENT:{protocol},INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "INTERNAL",
            "controller.listener.names": "CONTROLLER",
            **ONE_OF_EVERYTHING,
            **QUICK,
        }
        if self._tls:
            settings |= {
                "ssl.keystore.type": "PEM",
                "ssl.keystore.location": str(self._keystore()),
                "ssl.truststore.type": "PEM",
                "ssl.truststore.location": str(self.ca_file),
                "ssl.client.auth": "required" if self.require_certificate else "requested",
            }
        if self._sasl:
            login = f'required username="{USER}" password="{self.password}"'
            module = "org.apache.kafka.common.security"
            scram = f"{module}.scram.ScramLoginModule {login};"
            settings |= {
                "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
                "listener.name.client.plain.sasl.jaas.config": (
                    f'{module}.plain.PlainLoginModule {login} user_{USER}="{self.password}";'
                ),
                "listener.name.client.scram-sha-256.sasl.jaas.config": scram,
                "listener.name.client.scram-sha-512.sasl.jaas.config": scram,
            }
        return settings

    def _keystore(self) -> Path:
        """Return a file with key and certificate, the format that Kafka requires."""
        path = self.certificates / "keystore.pem"
        path.touch(mode=0o600)
        path.write_text("".join((self.certificates / part).read_text() for part in ("server.key", "server.pem")))
        return path


ONE_OF_EVERYTHING = {
    "auto.create.topics.enable": "false",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.num.partitions": "4",
}
QUICK = {
    "broker.session.timeout.ms": "2000",
    "broker.heartbeat.interval.ms": "500",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
}
"""Short timeouts: the cluster detects a killed broker or consumer within seconds."""
