"""A Kafka and a MinIO for one test, which may kill them, and runs over both."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.runs.run_process import ROOT, RunProcess
from tools.backends.kafka import Kafka
from tools.backends.minio import Minio


@dataclass(frozen=True)
class LogServer:
    """A Kafka; a run with `flags` and `environment` uses it. Its store is a folder."""

    kafka: Kafka

    @property
    def flags(self) -> list[str]:
        """Configuration keys of a run over these servers."""
        return ["--bus.kind=kafka", f"--bus.servers={self.kafka.servers}"]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with the credentials."""
        return {}

    def run(self, toml: Path, *flags: str) -> RunProcess:
        """`palimpsest run` with two rollout workers and a learner of two ranks."""
        both = ("--local.rollout_workers=2", "--local.learner_ranks=2")
        return RunProcess(toml, *self.flags, *both, *flags, environment=self.environment)

    def audit(self, home: Path) -> dict[str, Any]:
        """JSON output of the audit of a run, plus `sound`: True if the audit found no fault."""
        done = subprocess.run(
            [sys.executable, "-m", "palimpsest", "audit", str(home), "--json"],
            cwd=ROOT,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, 1), done.stderr
        return {**json.loads(done.stdout), "sound": done.returncode == 0}


@dataclass(frozen=True)
class Cluster(LogServer):
    """A Kafka and a MinIO."""

    minio: Minio

    @property
    def flags(self) -> list[str]:
        return [
            *super().flags,
            "--snapshot_store.storage=s3",
            f"--snapshot_store.endpoint={self.minio.endpoint}",
            "--snapshot_store.create_bucket=true",
        ]

    @property
    def environment(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.minio.access_key, "AWS_SECRET_ACCESS_KEY": self.minio.secret_key}


@contextmanager
def log_server(folder: Path) -> Iterator[LogServer]:
    """Start a Kafka, and stop it on exit."""
    with Kafka(folder / "kafka") as kafka:
        yield LogServer(kafka)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start both servers, and stop them on exit."""
    with Kafka(folder / "kafka") as kafka, Minio(folder / "minio") as minio:
        yield Cluster(kafka, minio)
