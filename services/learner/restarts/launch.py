"""Launches the ranks with restarts, and states in one line how a launcher ended."""

import os
import signal
import sys
from functools import partial
from types import FrameType
from typing import Any

from torch.distributed import DistError, run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)
from torch.distributed.launcher import api as launcher

from palimpsest.common.config import load
from palimpsest.common.user_error import ExitCode
from palimpsest.services.learner.checkpointing.manifest import complete, version_and_writer
from palimpsest.services.learner.restarts.agent import RestartingAgent, RunEnded

AGAIN = "Start the launchers of all nodes again: they continue from the newest committed checkpoint"


def launch(options: Any) -> int:
    """Launch the ranks, start them again after crashes, and wait for the end of the run. Returns the exit code."""
    fewest, most = torchrun.parse_min_max_nnodes(options.nnodes)
    at_an_address = most > 1 or options.master_port is not None or options.rdzv_endpoint
    if options.rdzv_backend == "static" and at_an_address and not options.standalone:
        return _say(
            "--max-restarts needs nodes that meet again: replace --node-rank, --master-addr and --master-port by "
            "--rdzv-backend=c10d --rdzv-endpoint=HOST:PORT --rdzv-id=NAME, or leave it out",
            ExitCode.CONFIGURATION,
        )
    for number in (signal.SIGTERM, signal.SIGINT):  # torch does so when it has started ranks; nodes may be missing
        signal.signal(number, _end)
    agent = partial(RestartingAgent, min_nodes=fewest, checkpoint=partial(_newest_version, options))
    of_torch: Any = launcher
    replaced, of_torch.LocalElasticAgent = of_torch.LocalElasticAgent, agent
    try:
        torchrun.run(options)  # type: ignore[no-untyped-call]
    except RunEnded as error:
        return _say(error.ending.text, error.ending.code)
    except SignalException:
        return ExitCode.INTERRUPTED
    except RendezvousTimeoutError:
        return _say(f"fewer than {fewest} nodes came to the rendezvous in time. {AGAIN}", ExitCode.UNAVAILABLE)
    except RendezvousClosedError:
        return _say(f"the rendezvous {options.rdzv_id} is over: its run has ended. {AGAIN}", ExitCode.UNAVAILABLE)
    except (RendezvousConnectionError, DistError) as error:
        return _say(
            f"the rendezvous at {options.rdzv_endpoint} does not answer ({str(error).splitlines()[0]}): the node that "
            f"serves it has ended. {AGAIN}",
            ExitCode.UNAVAILABLE,
        )
    finally:
        of_torch.LocalElasticAgent = replaced
    return ExitCode.DONE


def _newest_version(options: Any) -> int | None:
    """Version of the newest committed checkpoint of the run that the ranks train; None if it has none. Raises OSError,
    UserError."""
    found = load(options.training_script_args, os.environ, program=options.training_script)
    places = [version_and_writer(folder.name) for folder in complete(found.config.checkpoint_folder)]
    return max((place[0] for place in places if place is not None), default=None)


def _say(text: str, code: int) -> int:
    sys.stderr.write(f"{text}\n")
    return code


def _end(number: int, _frame: FrameType | None) -> None:
    raise SignalException(f"signal {number}", signal.Signals(number))
