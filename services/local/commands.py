"""The services of a run as commands of this machine: which programs, with which flags, on which ports."""

import socket
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from palimpsest.common import run_folder
from palimpsest.common.config.proximal import PROXIMAL_KINDS
from palimpsest.common.config.schema import RunConfig
from palimpsest.services.local.processes import Child, python

LEARNER = "learner"
ALONE = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
"""What torchrun would tell one rank. The machine's own (a Slurm job's, say) are not meant for it."""
_given: set[int] = set()


def free_port(host: str) -> int:
    """A port that nobody listens on at this moment, and that was not given out before."""
    while True:
        with closing(socket.socket()) as probe:
            probe.bind((host, 0))
            port = int(probe.getsockname()[1])
        if port not in _given:  # the system may offer the same one again before anybody listens there
            _given.add(port)
            return port


@dataclass(frozen=True, slots=True)
class Commands:
    """Makes the processes of a run; starts none. The configuration has its ports (supervisor.addressed)."""

    config: RunConfig
    source: Path
    """The run's file, which every service reads."""
    flags: list[str]
    """What every service is told besides."""

    def servers(self) -> list[Child]:
        """Store and gateway."""
        return [self._child(name, (f"palimpsest.services.{name}",)) for name in ("snapshot_store", "env_gateway")]

    def learner(self) -> Child:
        """One rank is a process of its own; several are launched by torchrun, which leaves files in a folder."""
        ranks = self.config.local.learner_ranks
        if ranks == 1:
            alone = self._child(LEARNER, ("palimpsest.services.learner",))
            alone.environment |= ALONE
            return alone
        scratch = run_folder.cache_folder(self.config.run.home, "torchrun")
        launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"--log-dir={scratch}")
        return self._child(LEARNER, (*launcher, "-m", "palimpsest.services.learner"), scratch=scratch)

    def workers(self) -> dict[str, tuple[Child, str]]:
        """Name -> the process and where it answers."""
        names = [f"worker-{i}" for i in range(self.config.local.rollout_workers)]
        return self._numbered(
            names, "palimpsest.services.rollout", host=self.config.rollout.host, named="rollout.worker"
        )

    def replicas(self) -> dict[str, tuple[Child, str]]:
        """Name -> the process and where it answers."""
        kind = PROXIMAL_KINDS[self.config.learner.proximal.kind]
        wanted = max(1, self.config.local.replicas) if kind.runs_replicas else 0
        names = [f"replica-{i}" for i in range(wanted)]
        return self._numbered(
            names, "palimpsest.services.learner.replica", host=self.config.replica.host, named="replica.name"
        )

    def _numbered(self, names: Iterable[str], module: str, *, host: str, named: str) -> dict[str, tuple[Child, str]]:
        made = {}
        for name in names:
            port = free_port(host)
            own = (f"--{named}={name}", f"--{named.partition('.')[0]}.port={port}")
            made[name] = (self._child(name, (module,), *own), f"http://{host}:{port}")
        return made

    def _child(self, name: str, program: tuple[str, ...], *own: str, scratch: Path | None = None) -> Child:
        home = self.config.run.home
        run_folder.refusal_file(home, name).unlink(missing_ok=True)
        command = python("-m", *program, str(self.source), *self.flags, *own)
        return Child(name, command, run_folder.log_file(home, name), scratch=scratch)
