"""torchrun's agent, which starts all ranks again after a crash, ends at an error that would return, and says which rank
died of what.

torch restarts after any failure, at most --max-restarts times, and each launcher decides alone. Here the launchers tell
each other what happened (round.py), so that all end with the exit code of the rank that failed.
"""

import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError

from palimpsest.common.user_error import ExitCode
from palimpsest.services.learner.restarts.deaths import (
    STOPPED,
    LearnerEnding,
    PastDeath,
    RankDeath,
    decisive,
    describe,
    describe_leaving,
    shell_code,
    why_not_again,
)
from palimpsest.services.learner.restarts.round import LOST_S, Round

LOOK_S = 1.0
"""Seconds between looks at what other launchers tell."""
CAUSE_S = 3.0
"""A crash with exit code 1 may follow from the death of another rank, whose launcher tells so within these seconds."""
READ_S = 30.0
"""Limit for the other launchers to learn how the run ended, in seconds."""
FINISH_S = 300.0
"""Limit for the ranks of the other nodes to end after those of this one, in seconds."""


class RunEnded(Exception):
    """Raised if the ranks do not start again."""

    def __init__(self, ending: LearnerEnding) -> None:
        super().__init__(ending.text)
        self.ending = ending


class RestartingAgent(LocalElasticAgent):
    """The launcher of one node."""

    def __init__(self, *, min_nodes: int, checkpoint: Callable[[], int | None], **of_torch: Any) -> None:
        """min_nodes: the ranks start again on at least as many nodes. checkpoint: version of the newest committed
        checkpoint; None if there is none. Raises OSError, UserError if it cannot be seen. of_torch: see torch."""
        super().__init__(**of_torch)
        self._min_nodes, self._checkpoint = min_nodes, checkpoint
        self._host = socket.gethostname()
        self._round: Round | None = None
        self._succeeded: RunResult | None = None
        self._limit = self._next_look = 0.0
        self._cause = ""
        self._past: list[PastDeath] = []
        self._asked_to_end = False

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        """See the base class. Raises RunEnded."""
        try:
            result: RunResult | None = super().run(role)
        except RunEnded:
            self._wait_until_all_know()
            raise
        except SignalException:
            with suppress(DistError):
                if self._round is not None and self._round.ending() is not None:
                    self._wait_until_all_know()
            raise
        except RendezvousClosedError:
            ending = None if self._round is None else self._round.ending()
            if ending is None:
                raise
            self._wait_until_all_know()
            raise RunEnded(ending) from None
        if result is None:  # the rendezvous was closed while this launcher waited
            raise RunEnded(LearnerEnding(ExitCode.DONE, "the run has ended; this node was not needed"))
        self._wait_until_all_know()
        return result

    def _wait_until_all_know(self) -> None:
        """Wait until all launchers know how the run ended: this one may serve the rendezvous."""
        assert self._round is not None
        handler: Any = self._worker_group.spec.rdzv_handler
        deadline = time.monotonic() + READ_S
        with suppress(RendezvousError, DistError):
            self._round.tell_read()
            handler.shutdown()  # for launchers that wait for a new round
            while not self._round.all_read() and time.monotonic() < deadline:
                time.sleep(LOOK_S)
            if self._round.nodes > 1:
                time.sleep(2 * LOOK_S)  # so that each has looked before the server ends
        handler.shutdown = lambda: True  # torch calls it again, perhaps without the server

    def _invoke_run(self, role: str = DEFAULT_ROLE) -> RunResult:
        try:
            return super()._invoke_run(role)
        except SignalException:
            if self._round is not None:
                with suppress(RendezvousError, DistError):  # the node that serves the rendezvous may have ended too
                    if self._round.leave(self._min_nodes):
                        handler: Any = self._worker_group.spec.rdzv_handler
                        handler.shutdown()  # launchers that wait for a new round look only whether it is closed
            raise

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        # torch keeps the first store for the ranks, with the addresses of ranks that are gone, also if rank 0 moves
        handler: Any = worker_group.spec.rdzv_handler
        handler._bootstrap_store_info = handler._shared_tcp_store_server = None
        super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        node, nodes = worker_group.group_rank, worker_group.group_world_size
        assert node is not None
        assert nodes is not None
        again = self._round is not None
        self._round = Round(worker_group.store, node=node, nodes=nodes)
        self._succeeded = None
        cause, self._cause = self._cause, ""
        if again:
            ranks = worker_group.workers[0].world_size
            self._say(
                f"{cause}; {_number(ranks, 'rank')} on {_number(nodes, 'node')} start again{self._from_checkpoint()}"
            )
        started: dict[int, Any] = super()._start_workers(worker_group)
        return started

    def _from_checkpoint(self) -> str:
        """From where the ranks continue, on the node of rank 0, whose log has it in any case."""
        if self._worker_group.group_rank != 0 or (seen := self._newest_checkpoint()) is None:
            return ""
        return f" from {'the beginning' if seen[0] is None else f'the committed checkpoint of version {seen[0]}'}"

    def _newest_checkpoint(self) -> tuple[int | None] | None:
        try:
            return (self._checkpoint(),)
        except Exception:  # a message must not end the launcher
            return None

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        assert self._round is not None
        if self._succeeded is None:
            result: RunResult = super()._monitor_workers(worker_group)
            if result.state is WorkerState.FAILED:
                return self._after_failure(result)
            if result.state is WorkerState.SUCCEEDED:
                self._succeeded, self._limit = result, time.monotonic() + FINISH_S
                self._round.finish()
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_S
            if (ending := self._round.ending()) is not None:
                self._stop_workers(worker_group)
                raise RunEnded(ending)
            if leaving := self._round.leaving():
                return self._without_them(worker_group, leaving)
            if (node := self._round.lost()) is not None:
                return self._after_loss(node)
            if self._succeeded is not None and self._round.all_finished():
                return self._succeeded
        if self._succeeded is not None and time.monotonic() > self._limit:
            return self._succeeded
        return RunResult(state=WorkerState.HEALTHY)  # the base class looks whether other nodes wait for a new round

    def _after_failure(self, result: RunResult) -> RunResult:
        """Tell the other launchers. Raises RunEnded if the ranks do not start again."""
        assert self._round is not None
        failures = result.failures
        rank = decisive({rank: (one.timestamp, one.exitcode) for rank, one in failures.items()})
        own = RankDeath(failures[rank].exitcode, describe(rank, self._host, failures[rank].exitcode))
        deadline = time.monotonic() + CAUSE_S
        while own.code == ExitCode.CRASHED and time.monotonic() < deadline:
            if self._round.death() is not None or self._round.ending() is not None:
                break
            time.sleep(self._worker_group.spec.monitor_interval)
        if (ending := self._round.ending()) is not None:
            raise RunEnded(ending)
        first = self._round.tell_death(own)
        self._cause = first.text if first == own else f"{own.text} after {first.text}"
        decided = first if own.code == ExitCode.CRASHED else own
        return self._again_or_end(decided, result)

    def _after_loss(self, node: int) -> RunResult:
        assert self._round is not None
        text = f"node {node} of {self._round.nodes} gave no sign of life for {LOST_S:.0f} s"
        first = self._round.tell_death(RankDeath(int(ExitCode.UNAVAILABLE), text))
        self._cause = first.text
        result = RunResult(state=WorkerState.UNHEALTHY)
        return self._again_or_end(RankDeath(int(ExitCode.CRASHED), first.text), result)

    def _again_or_end(self, death: RankDeath, result: RunResult) -> RunResult:
        """Return the result if the ranks start again, else raise RunEnded."""
        assert self._round is not None
        if self._round.node == 0 and (seen := self._newest_checkpoint()) is not None:
            self._past.append(PastDeath(death.code, seen[0]))
        allowed = self._worker_group.spec.max_restarts
        if why := why_not_again(death.code, self._past, left=self._remaining_restarts, allowed=allowed):
            ending = self._round.tell_ending(LearnerEnding(shell_code(death.code), f"{self._cause}; {why}"))
            raise RunEnded(ending)
        used = allowed - self._remaining_restarts + 1
        self._say(f"{self._cause}; the ranks of all nodes start again (restart {used} of {allowed})")
        return result

    def _without_them(self, worker_group: WorkerGroup, leaving: int) -> RunResult:
        """Continue without the nodes that leave, or end."""
        assert self._round is not None
        self._cause = describe_leaving(leaving, self._round.nodes)
        if self._round.nodes - leaving < self._min_nodes:
            self._stop_after_a_checkpoint()
            raise RunEnded(LearnerEnding(int(ExitCode.INTERRUPTED), f"{self._cause}; {STOPPED}"))
        self._restart_workers(worker_group)
        return RunResult(state=WorkerState.HEALTHY)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        assert self._round is not None
        death = self._round.death()
        if death is None and self._round.ending() is None:
            self._cause = self._cause if self._round.leaving() else "a node joined"
            self._stop_after_a_checkpoint()
            return
        self._cause = self._cause or (death.text if death is not None else "")
        super()._stop_workers(worker_group)  # the ranks cannot continue without the one that died

    def _stop_after_a_checkpoint(self) -> None:
        """Let the ranks finish their step and write a checkpoint."""
        try:
            self._shutdown(timeout=self._shutdown_timeout)
        except SignalException:
            self._asked_to_end = True
            raise

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        if self._asked_to_end:  # a second signal would end the ranks at once, without a checkpoint
            self._asked_to_end = False
            processes: Any = self._pcontext
            deadline = time.monotonic() + timeout
            while any(rank.proc.poll() is None for rank in processes.subprocess_handlers.values()):
                if time.monotonic() > deadline:
                    break
                time.sleep(self._worker_group.spec.monitor_interval)
        super()._shutdown(death_sig, timeout)

    def _say(self, text: str) -> None:
        sys.stderr.write(f"launcher on {self._host}: {text}\n")
        sys.stderr.flush()


def _number(count: int, of: str) -> str:
    return f"{count} {of}{'' if count == 1 else 's'}"
