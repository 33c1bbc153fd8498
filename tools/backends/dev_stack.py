"""Kafka and MinIO in one folder. They keep running after the command that started them exits."""

import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from palimpsest.common.user_error import ExitCode, UserError
from tools.backends import cache, downloads, ports
from tools.backends.cache import Say
from tools.backends.kafka import Kafka
from tools.backends.minio import Minio
from tools.backends.process import Server
from tools.backends.process_identity import Identity

USUAL_PORTS = {"kafka": 9092, "minio": 9000}
NO_PROGRESS_LIMIT_S = 120.0
"""Start limit without progress. A broker that recovers a segment of 1 GB from a slow disk logs nothing for a minute."""
TITLES = {"kafka": Kafka.title, "minio": Minio.title}


@dataclass(frozen=True)
class DevStack:
    """The two servers of a folder. Each has a subfolder for data, log, port and process record."""

    folder: Path
    say: Say

    def up(self, kafka_port: int | None, minio_port: int | None) -> dict[str, str]:
        """Start both servers. Returns the environment variables of a run and writes them to a file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with cache.locked(self.folder / "lock", self._waits):
            downloads.kafka(self.say)
            downloads.minio(self.say)
            kafka = Kafka(self.folder / "kafka", port=self._port("kafka", kafka_port), detached=True)
            self._up(kafka, kafka.servers)
            minio = Minio(self.folder / "minio", port=self._port("minio", minio_port), detached=True)
            self._up(minio, minio.endpoint)
            settings = {
                "AWS_ACCESS_KEY_ID": minio.access_key,
                "AWS_SECRET_ACCESS_KEY": minio.secret_key,
                "PALIMPSEST_BUS__SERVERS": kafka.servers,
                "PALIMPSEST_SNAPSHOT_STORE__ENDPOINT": minio.endpoint,
            }
            self._write(settings)
        return settings

    def down(self) -> None:
        """Stop both servers and keep their data. Never signals another process, even if a record is outdated."""
        if not self.folder.is_dir():
            self.say(f"nothing was started in {self.folder}")
            return
        with cache.locked(self.folder / "lock", self._waits):
            for name, title in TITLES.items():
                started = time.monotonic()
                if (process := self._process(name)) is None:
                    self.say(f"{title} did not run")
                else:
                    process.end()
                    self.say(f"{title} stopped after {time.monotonic() - started:.1f} s")
                self._record(name).unlink(missing_ok=True)

    def status(self) -> bool:
        """Print the status of both servers. Returns whether both run."""
        running = [self._say_status(name, title) for name, title in TITLES.items()]
        return all(running)

    @property
    def environment(self) -> Path:
        """The shell file with the settings."""
        return self.folder / "environment"

    def _up(self, server: Server, address: str) -> None:
        if (process := self._process(server.folder.name)) is not None:
            if not server.answers():
                raise UserError(
                    f"{server.title} runs (process {process.pid}) but does not answer at {address}: read "
                    f"{server.log}, or stop it with `down` and repeat the command",
                    ExitCode.UNAVAILABLE,
                )
            self.say(f"{server.title} runs already: {address}")
            return
        started = time.monotonic()
        server.start(NO_PROGRESS_LIMIT_S, self.say)
        self.say(f"{server.title} runs: {address}, after {time.monotonic() - started:.1f} s; its log is {server.log}")

    def _port(self, name: str, wanted: int | None) -> int | None:
        """Return the port to start on, or None for the port in the folder of the server."""
        there = ports.remembered(self.folder / name / "port")
        if self._process(name) is not None:
            if wanted is not None and wanted != there:
                raise UserError(
                    f"{TITLES[name]} runs already, on port {there}: stop it with `down` to move it to {wanted}"
                )
            return None
        if wanted is not None or there is not None:
            return wanted
        usual = USUAL_PORTS[name]
        if ports.is_free(usual):
            return usual
        self.say(f"port {usual} is in use: {TITLES[name]} uses another port")
        return None

    def _say_status(self, name: str, title: str) -> bool:
        if (process := self._process(name)) is None:
            self.say(f"{title} does not run")
            return False
        port = ports.remembered(self.folder / name / "port")
        self.say(f"{title} runs on port {port} of {ports.HOST} (process {process.pid})")
        return True

    def _process(self, name: str) -> Identity | None:
        """Return the process of the server, or None if it does not run."""
        process = Identity.read(self._record(name))
        return process if process is not None and process.alive else None

    def _record(self, name: str) -> Path:
        return self.folder / name / "process.json"

    def _write(self, settings: dict[str, str]) -> None:
        partial = self.environment.with_suffix(".partial")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.writelines(f"{line}\n" for line in exports(settings))
        partial.replace(self.environment)

    def _waits(self) -> None:
        self.say(f"waiting for another `up` or `down` in {self.folder}")


def exports(settings: dict[str, str]) -> list[str]:
    """Return the shell lines that set these variables.

    >>> exports({"NAME": "two words"})
    ["export NAME='two words'"]
    """
    return [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
