"""torchrun with the exit code of its ranks, for several ranks of the learner.

python -m palimpsest.services.learner.torchrun --standalone --nproc-per-node=2 -m palimpsest.services.learner RUN.toml

With --max-restarts, or a c10d rendezvous of several nodes, the launchers start the ranks again (restarts/agent.py).

The arguments are torchrun's. torchrun itself exits with 1 however a rank ended, so that a supervisor or a Kubernetes
Job could not tell an error of the configuration (do not start again) from a crash (start again).
"""

import sys
from collections.abc import Iterable

from palimpsest.common.user_error import ExitCode
from palimpsest.services.learner.restarts.deaths import decisive, shell_code

SHUTDOWN_S = 3600
"""Seconds that ranks have after SIGTERM to finish their step and write a checkpoint. The supervisor, or the grace
period of the pod, ends them earlier; torchrun's own limit of 30 s would kill a rank in a long step."""


def main(arguments: list[str]) -> int:
    """Launch the ranks and wait for them. Returns the exit code."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = torchrun.parse_args([f"--shutdown-timeout={SHUTDOWN_S}", *arguments])  # type: ignore[no-untyped-call]
    several = torchrun.parse_min_max_nnodes(options.nnodes)[1] > 1
    if options.max_restarts > 0 or (several and options.rdzv_backend != "static"):
        from palimpsest.services.learner.restarts.launch import launch  # reads the configuration, which others need not

        return launch(options)
    try:
        torchrun.run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        sys.stderr.write(f"{error}\n")
        return exit_code((failure.timestamp, failure.exitcode) for failure in error.failures.values())
    except SignalException:  # the ranks received the signal too, and have stopped
        return ExitCode.INTERRUPTED
    return ExitCode.DONE


def exit_code(failures: Iterable[tuple[int, int]]) -> int:
    """Return the exit code of the rank that ended the others.

    failures: of each failed rank, the time of its failure in seconds and its exit code, negative for a signal.

    >>> exit_code([(5, 1), (6, 4)]), exit_code([(5, -9), (6, 1)])
    (4, 137)
    """
    by_rank = dict(enumerate(failures))
    return shell_code(by_rank[decisive(by_rank)][1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
