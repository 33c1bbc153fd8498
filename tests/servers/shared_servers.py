"""One Kafka and one MinIO for all processes of a test session.

A process of their own starts them and ends with the session, however that ends: the first test that needs a server
starts that process, those in other workers of pytest-xdist find it by its folder. Nobody stops, kills or pauses a
shared server: a test that has to takes one of its own (`own_kafka`, `own_minio` in conftest.py).

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
"""Those that this process started; kept so that nobody complains that they still run."""


def shared(kind: str, folder: Path, session: int) -> Server:
    """The session's server of this kind, started if it is not. `folder`: the session's; `session`: its process."""
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
            start_new_session=True,  # Ctrl-C ends the session, and that ends it
        )
    _keepers.append(keeper)
    assert keeper.stdout is not None
    with keeper.stdout as said:
        assert said.readline() == READY, f"no {kind} for this session: {log.read_text()[-4000:]}"


def main(kind: str, folder: Path, session: int) -> None:
    """Keep the server until the session's process is gone."""
    watched = os.pidfd_open(session)
    with KINDS[kind](folder):
        os.write(1, READY)
        end = select.poll()
        end.register(watched, select.POLLIN)
        end.poll()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
