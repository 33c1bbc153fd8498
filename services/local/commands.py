"""Commands that start a run's services on this machine: programs, flags and ports."""

import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from palimpsest.common import run_folder
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.secret_variables import SECRETS_OF
from palimpsest.common.sessions.placed import needs_gateway
from palimpsest.services.local.placement import LEARNER, Placement
from palimpsest.services.local.processes import Child, python

ALONE = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
"""The variables that torchrun sets for a single rank. They override those of the machine, such as a Slurm job's."""
_reserved: list[socket.socket] = []


def free_port(host: str) -> int:
    """Return a free port and reserve it until this process ends.

    A socket that is bound with SO_REUSEADDR and does not listen keeps other processes from receiving the port as an
    ephemeral one. A service that also sets SO_REUSEADDR (common/service.py) can still listen on it.
    """
    reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((host, 0))
    _reserved.append(reserved)
    return int(reserved.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Commands:
    """Creates the processes of a run without starting them. `config` has its ports (supervisor.assign_ports)."""

    config: RunConfig
    source: Path
    """The run's configuration file, which every service reads."""
    flags: list[str]
    """Additional flags of every service."""
    gpus: Placement = field(default_factory=Placement)

    def servers(self) -> list[Child]:
        """Return the processes of the store and, if the run needs one, of the gateway."""
        names = ("snapshot_store", "env_gateway") if needs_gateway(self.config) else ("snapshot_store",)
        return [self._child(name, (f"palimpsest.services.{name}",)) for name in names]

    def learner(self) -> Child:
        """Return the learner's process: the single rank, or torchrun, which launches several ranks and writes files."""
        ranks = self.config.local.learner_ranks
        if ranks == 1:
            alone = self._child(LEARNER, ("palimpsest.services.learner",))
            alone.environment |= ALONE
            return alone
        scratch = run_folder.cache_folder(self.config.run.home, "torchrun")
        launcher = (
            "palimpsest.services.learner.torchrun",
            "--standalone",
            f"--nproc-per-node={ranks}",
            f"--log-dir={scratch}",
        )
        return self._child(LEARNER, (*launcher, "-m", "palimpsest.services.learner"), scratch=scratch)

    def workers(self) -> dict[str, tuple[Child, str]]:
        """Return name -> (process, URL)."""
        names = [f"worker-{i}" for i in range(self.config.local.rollout_workers)]
        return self._numbered(
            names, "palimpsest.services.rollout", host=self.config.rollout.host, named="rollout.worker"
        )

    def replicas(self) -> dict[str, tuple[Child, str]]:
        """Return name -> (process, URL)."""
        names = [f"replica-{i}" for i in range(self.config.replica_count)]
        return self._numbered(
            names, "palimpsest.services.learner.replica", host=self.config.replica.host, named="replica.name"
        )

    def _numbered(self, names: Iterable[str], module: str, *, host: str, named: str) -> dict[str, tuple[Child, str]]:
        processes = {}
        for name in names:
            port = free_port(host)
            own = (f"--{named}={name}", f"--{named.partition('.')[0]}.port={port}")
            processes[name] = (self._child(name, (module,), *own), f"http://{host}:{port}")
        return processes

    def _child(self, name: str, program: tuple[str, ...], *own: str, scratch: Path | None = None) -> Child:
        home = self.config.run.home
        run_folder.refusal_file(home, name).unlink(missing_ok=True)
        command = python("-m", *program, str(self.source), *self.flags, *own)
        environment = self.gpus.variables(name)
        secrets = SECRETS_OF[program[-1].removeprefix("palimpsest.services.")]
        return Child(
            name, command, run_folder.log_file(home, name), environment=environment, scratch=scratch, secrets=secrets
        )
