"""A run over a real Kafka, with or without a MinIO, whose services the caller starts, kills and pauses."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil

from palimpsest.common.arrays import pack_float32
from palimpsest.common.bus.claim_check import CLAIM
from palimpsest.common.bus.port import Outgoing
from palimpsest.common.config import load
from palimpsest.common.config.to_toml import to_toml
from palimpsest.common.files import write
from palimpsest.common.messages import encode
from palimpsest.common.rejected_record import RejectCause
from palimpsest.common.trajectory import Segment
from palimpsest.common.versions import Version
from tests.records.builders import a_finished, a_segment
from tests.runs.unsupervised import Services
from tests.servers.cluster import LogServer
from tools.backends import ports

WORKERS = ("worker-0", "worker-1")


class ClusterRun:
    """A run as on several machines: the test starts and restarts every service itself.

    stepped_clock: workers, gateway and store take the wall clock's offset in seconds from the file `offset`.
    """

    def __init__(self, cluster: LogServer, toml: Path, name: str, *run_flags: str, stepped_clock: bool = False) -> None:
        self.cluster, self.name = cluster, name
        folder = toml.parent / name
        self.home = folder / name
        flags = (*cluster.flags, *run_flags, f"--run.id={name}", f"--run.folder={folder}")
        self.services = Services(toml, self.home, *flags, environment=cluster.environment)
        config = load([str(toml), *flags], {}, program="").config
        write(self.home / "run.toml", to_toml(config).encode())  # as `palimpsest run` would: the audit reads it
        self.offset = folder / "clock_offset"
        self._launcher = ("-m", "tests.runs.stepped_clock", str(self.offset)) if stepped_clock else ()
        self.learners = self.repeated = 0
        for server in ("snapshot_store", "env_gateway"):
            self.server(server)
        for worker in WORKERS:
            self.worker(worker)
        self.learner = self.another_learner()

    def server(self, name: str) -> None:
        """Start the store or the gateway."""
        self.services.start(name, name, launcher=self._launcher)

    def worker(self, name: str) -> None:
        """Start a rollout worker."""
        flags = (f"--rollout.worker={name}", f"--rollout.port={ports.free()}")
        self.services.start(name, "rollout", *flags, launcher=self._launcher)

    def another_learner(self) -> str:
        """Start a learner of two ranks. Returns its name."""
        self.learners += 1
        name = f"learner-{self.learners}"
        self.services.ranks(name, 2)
        return name

    def ranks(self) -> list[psutil.Process]:
        """Processes of the present learner's two ranks."""
        family = psutil.Process(self.services.process(self.learner).pid).children(recursive=True)
        found = []
        for process in family:
            with suppress(psutil.Error):  # a rank starts short programs while it imports torch
                if "palimpsest.services.learner" in process.cmdline():
                    found.append(process)
        return found

    def trained(self) -> int:
        """Number of trained versions."""
        path = self.home / "history.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def versions(self, more: int) -> None:
        """Wait until `more` further versions are trained. No service may fail meanwhile."""
        expected = self.trained() + more
        self.services.until(lambda: bool(self.services.died()) or self.trained() >= expected, f"version {expected}")
        assert self.services.died() == {}

    def audit(self) -> dict[str, Any]:
        """Assert that the audit finds no fault now. Returns its report."""
        report = self.cluster.audit(self.home)
        assert report["sound"], report["findings"]
        return report


def poison(run: str, group: str) -> Iterator[tuple[RejectCause, Outgoing]]:
    """Invalid records, each with its expected cause of rejection. `group`: an offered group."""
    index = int(group[1:])

    def finished(*segments: Segment, **changes: Any) -> Outgoing:
        record = a_finished(index, 0, run=run, segments=segments)
        return Outgoing(group, encode(msgspec.structs.replace(record, **changes)))

    sound = encode(a_finished(index, 0, run=run))
    yield RejectCause.UNDECODABLE, Outgoing(group, b"\xff\x00garbage")
    yield RejectCause.UNDECODABLE, Outgoing(group, b"")
    yield RejectCause.UNDECODABLE, Outgoing(group, sound[:-7])
    yield RejectCause.UNKNOWN_SCHEMA, Outgoing(group, sound.replace(b"trajectory_finished/1", b"trajectory_finished/9"))
    yield RejectCause.NOT_FINITE, finished(Segment(2, 6, Version(0), pack_float32([-1.0, float("nan"), -1.0, -1.0])))
    yield RejectCause.NOT_FINITE, finished(Segment(2, 6, Version(0), pack_float32([-1.0, float("-inf"), -1.0, -1.0])))
    yield RejectCause.LENGTH_MISMATCH, finished(Segment(2, 6, Version(0), pack_float32([-1.0] * 3)))
    yield RejectCause.LENGTH_MISMATCH, finished(a_segment(2, 99, 0))
    yield RejectCause.NEGATIVE_VERSION, finished(a_segment(2, 6, -3))
    yield RejectCause.UNKNOWN_VERSION, finished(a_segment(2, 6, 10_000))
    yield RejectCause.WRONG_RUN, finished(a_segment(2, 6, 0), run="another")
    yield RejectCause.NEVER_OFFERED, Outgoing("g900000", encode(a_finished(900_000, 0, run=run)))
    yield RejectCause.MISSING_CLAIM, Outgoing(group, b"", {CLAIM: "0" * 64})
