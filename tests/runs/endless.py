"""Runs without an end, which a test ends after it has seen what it waits for."""

from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from palimpsest.common.user_error import ExitCode
from palimpsest.control_client import ControlClient, url_in, wait_for as wait_for_change
from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import RunProcess, history, wait_for

ENDLESS = "--learner.versions=100000"


def send(learner: ControlClient, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Request a change of the run, and return it when it is applied."""
    change = wait_for_change(learner, learner.send(method, path, json=body), LIMIT_S)
    assert change["state"] == "applied", change
    return change


def end_after_two_versions(run: RunProcess, home: Path) -> int:
    """Let an endless run train a version, and then two more. Return their number in all."""
    before = len(history(home))
    wait_for(lambda: len(history(home)) > before, run, name="a further version")
    return end_soon(url_in(home, "learner"))


def end_soon(url: str) -> int:
    """Let the endless run of the learner at this address train two more versions. Return their number in all."""
    with closing(ControlClient(url)) as learner:
        last = int(send(learner, "POST", "/v1/actions/pause", {})["version"]) + 2
        send(learner, "PATCH", "/v1/settings", {"learner.versions": last})
        learner.send("POST", "/v1/actions/resume", json={})  # the learner may end before it could be asked again
    return last


def stop_after_two_versions(run: RunProcess, home: Path) -> int:
    """Let an endless run train two more versions, and stop it. Return their number in all.

    It has not ended, so that it can be continued: a change of `learner.versions` would stay in force without a flag.
    """
    before = len(history(home))
    wait_for(lambda: len(history(home)) >= before + 2, run, name="two further versions")
    run.process.terminate()
    code, output = run.finish()
    assert code == ExitCode.INTERRUPTED, output[-3000:]
    return len(history(home))


def kill_a_learner(run: RunProcess, *, ranks: int = 1) -> None:
    """SIGKILL the last rank of an endless run's learner. Return when all its ranks have ended."""
    learners = run.services()["learner"]
    assert len(learners) == ranks
    learners[-1].kill()
    assert psutil.wait_procs(learners, timeout=LIMIT_S)[1] == []  # rank 0 may otherwise write a version meanwhile


def several_versions(home: Path) -> bool:
    """Whether the run has trained on a trajectory of several versions."""
    return any(line["multi_version"] for line in history(home))
