"""Supervises the processes of a run on one machine until the run is done or stopped.

restart_policy.py decides which process is restarted and when; exit_reasons.py has the texts.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from palimpsest.common import run_folder
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.files import write
from palimpsest.common.service import Stop
from palimpsest.common.sessions.placed import needs_gateway
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.live.poller import RunObservation, ServiceObservation
from palimpsest.services.local import exit_reasons
from palimpsest.services.local.commands import Commands, free_port
from palimpsest.services.local.exit_reasons import Crash, last_error
from palimpsest.services.local.placement import LEARNER, place
from palimpsest.services.local.process_start import ProcessStart
from palimpsest.services.local.processes import HOPELESS, Child
from palimpsest.services.local.restart_policy import Death, append_death, is_crash_loop, restart_delay_s
from palimpsest.services.local.visible_gpus import visible_gpus

LOOK_S = 0.5
DRAIN_S = 25.0
"""Time limit for a service to stop cleanly, in seconds."""
START_DRAIN_S = 3.0
"""Time limit for a service that is still starting: it has nothing to finish."""
FOLLOW_S = 10.0
"""When the run ends, workers and replicas can exit this many seconds before the learner, at most."""


def assign_ports(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Return the configuration with free ports in place of 0, and the flags that pass them to every service."""
    flags = [f"--run.id={config.run.id}", f"--run.folder={config.run.folder}"]
    sections = {}
    for name in ("snapshot_store", "env_gateway", LEARNER):
        section = getattr(config, name)
        port = section.port or free_port(section.host)
        sections[name] = section.model_copy(update={"port": port})
        flags.append(f"--{name}.port={port}")
    return config.model_copy(update=sections), flags


class Supervisor:
    """Supervises the processes of one run. `clock` measures the delay before a restart."""

    def __init__(
        self, config: RunConfig, source: Path, flags: list[str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config, self._clock = config, clock
        self.home = config.run.home
        commands = Commands(config, source, flags, place(config, visible_gpus()))
        workers, replicas = commands.workers(), commands.replicas()
        self.servers, self.learner = commands.servers(), commands.learner()
        self.workers = [child for child, _ in workers.values()]
        self.replicas = [child for child, _ in replicas.values()]
        self.urls = {
            "snapshot_store": config.store_url,
            **({"env_gateway": config.gateway_url} if needs_gateway(config) else {}),
            LEARNER: f"http://{config.learner.host}:{config.learner.port}",
        } | {name: url for name, (_, url) in workers.items()}
        self.replica_urls = {name: url for name, (_, url) in replicas.items()}
        self.crashes: list[Crash] = []
        """Crashes after which the process was or will be restarted."""
        self._versions = 0
        """Number of versions that the run has trained, by the last observation."""
        self._planned = config.learner.versions
        """Number of versions after which the run ends, by the last observation."""
        self._lives: dict[Child, ProcessStart] = {}
        self._rows: dict[Child, tuple[Death, ...]] = {}
        """Deaths since the process last worked."""
        self._due: dict[Child, float] = {}
        """Time of the restart of a dead process, by the clock."""
        self._ended: dict[Child, float] = {}

    @property
    def children(self) -> list[Child]:
        """All processes, in the order of their start."""
        return [*self.servers, *self.workers, *self.replicas, self.learner]

    @property
    def is_stopped_over_rest(self) -> bool:
        """Whether the learner ended because a person requested a stop over REST."""
        return not self.learner.running and self.learner.exit_code == ExitCode.STOPPED

    @property
    def starts_again_in(self) -> Mapping[str, float]:
        """Seconds until the restart of each process that waits for one, by name."""
        now = self._clock()
        return {child.name: max(0.0, due - now) for child, due in self._due.copy().items()}

    def run(self, stop: Stop, look: Callable[[], RunObservation]) -> bool:
        """Supervise until the learner is done (True) or is stopped (False). Calls `look` twice a second.

        Raises UserError if a process refuses to run or crashes repeatedly.
        """
        try:
            for child in self.children:
                self._start(child)
            write(self.home / run_folder.ADDRESSES, json.dumps({**self.urls, **self.replica_urls}).encode())
            while not stop.wait(LOOK_S):
                self._observe(look())
                if not self.learner.running and self.learner.exit_code in (ExitCode.DONE, ExitCode.STOPPED):
                    return not self.is_stopped_over_rest
                for child in self.children:
                    if not child.running:
                        self._tend(child)
            return False
        finally:
            (self.home / run_folder.ADDRESSES).unlink(missing_ok=True)
            self._stop()

    def _start(self, child: Child) -> None:
        child.start()
        self._lives[child] = ProcessStart(child.started, self._versions, trains=child is self.learner)

    def _observe(self, sight: RunObservation) -> None:
        if sight.trained.last is not None:
            self._versions = sight.trained.last["published"]
        if (learner := sight.services.get(LEARNER)) is not None and learner.last is not None:
            self._planned = learner.last.status.get("versions", self._planned)
        for child, life in self._lives.items():
            if child.running:
                life.observe(
                    sight.services.get(child.name, ServiceObservation()), versions=self._versions, now=time.monotonic()
                )

    def _tend(self, child: Child) -> None:
        """Handle a process that is not running: restart it if its delay is over, or decide on its death."""
        if child in self._due:
            if self._clock() >= self._due[child]:
                del self._due[child]
                self._start(child)
        elif not self._may_be_done(child):
            self._ended.pop(child, None)
            self._on_death(child)

    def _may_be_done(self, child: Child) -> bool:
        """Whether a worker or replica exited because the run ended; it can exit before the learner does."""
        if child not in (*self.workers, *self.replicas) or child.exit_code != 0:
            return False
        ended = self._ended.setdefault(child, time.monotonic())
        return self._versions >= self._planned or time.monotonic() - ended < FOLLOW_S

    def _on_death(self, child: Child) -> None:
        refusal = _refusal(self.home, child)
        code = refusal[1] if refusal else child.exit_code or 0
        if code in HOPELESS:
            message = refusal[0] if refusal else child.last_words()
            raise UserError(f"{child.name}: {message}\nits log: {child.log}", ExitCode(code))
        error = refusal[0] if refusal else last_error(child.last_words(60))
        row = append_death(self._rows.get(child, ()), Death(code, error, self._lives[child].worked))
        self._rows[child] = row
        wait = restart_delay_s(row, restarts=self._config.local.restarts)
        if wait is None:
            raise UserError(
                self._give_up_text(child, row), ExitCode(code) if code == ExitCode.ENGINE else ExitCode.CRASHED
            )
        self.crashes.append(Crash(child.name, time.monotonic(), code, error, wait))
        self._due[child] = self._clock() + wait
        if not wait:
            self._tend(child)

    def _give_up_text(self, child: Child, row: tuple[Death, ...]) -> str:
        last = row[-1]
        how = exit_reasons.describe_exit("It", last.exit_code, last.error)
        if is_crash_loop(row):
            text = f"{child.name} died {len(row)} times in a row in the same way, before it did any work. {how}."
        else:
            text = f"{child.name} died {len(row)} times in a row (local.restarts). The last time: {how}."
        words = child.last_words()
        quoted = f"\nThe end of its log:\n{words}" if words else ""
        return f"{text} {exit_reasons.remedy(last.exit_code, last.error)}".rstrip() + f"{quoted}\nits log: {child.log}"

    def _stop(self) -> None:
        """Stop workers, replicas and learner first, because they need the servers until they exit."""
        for group in ([*self.workers, *self.replicas, self.learner], self.servers):
            for child in group:
                child.terminate()
            begun = time.monotonic()
            while any(child.running and time.monotonic() < begun + self._stop_limit_s(child) for child in group):
                time.sleep(0.05)
            for child in group:
                child.kill_group()

    def _stop_limit_s(self, child: Child) -> float:
        life = self._lives.get(child)
        return DRAIN_S if life is not None and life.ready is not None else START_DRAIN_S


def _refusal(home: Path, child: Child) -> tuple[str, int] | None:
    """Return message and exit code of a UserError in this process, or in one that it launched; None if there is none.

    common/program.py writes them to a file, because a launcher of ranks has no error text.
    """
    try:
        refusal = json.loads(run_folder.refusal_file(home, child.name).read_text())
    except (OSError, ValueError):
        return None
    if child.process is None or child.process.pid not in refusal["processes"]:
        return None
    return str(refusal["message"]), int(refusal["code"])
