"""One Kafka and one MinIO for all processes of a test session.

A keeper process runs each server and ends with the session, however the session ends. The first test that needs a
server starts the keeper; tests in other workers of pytest-xdist find the server by its folder. Tests must not stop,
kill or pause a shared server; a test that needs to uses `own_kafka` or `own_minio` of conftest.py.

    python -m tests.servers.shared_servers kafka FOLDER SESSION_PROCESS_ID
"""

import fcntl
import os
import select
import subprocess
import sys
from pathlib import Path

from tools.backends.kafka import Kafka
from tools.backends.minio import Minio
from tools.backends.process import Server

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"kafka": Kafka, "minio": Minio}
READY = b"ready\n"
_keepers: list[subprocess.Popen[bytes]] = []
"""Keepers that this process started. The references prevent ResourceWarnings about running processes."""


def shared(kind: str, folder: Path, session: int) -> Server:
    """Server of this kind for the session, started if necessary. `folder`: of the session; `session`: its pid."""
    home = folder / kind
    with (folder / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "ready").exists():
            _start(kind, home, session)
            (home / "ready").touch()
        return KINDS[kind](home)  # finds port and password in the folder


def _start(kind: str, home: Path, session: int) -> None:
    home.mkdir()
    log = home / "keeper.log"
    with log.open("wb") as errors:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "tests.servers.shared_servers", kind, str(home), str(session)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # Ctrl-C ends the session, and the keeper ends with it
        )
    _keepers.append(keeper)
    assert keeper.stdout is not None

    with keeper.stdout as output:
        assert output.readline() == READY, f"no {kind} for this session: {log.read_text()[-4000:]}"


def main(kind: str, folder: Path, session: int) -> None:
    """Run the server until the session's process ends."""
    watched = os.pidfd_open(session)
    with KINDS[kind](folder):
        os.write(1, READY)
        end = select.poll()
        end.register(watched, select.POLLIN)
        end.poll()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
