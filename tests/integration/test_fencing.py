"""A paused and replaced learner is refused when it resumes, and its successor trains on.

These tests use real processes at one failpoint; test_learner_schedules.py tests a pause at every failpoint.

The test starts the services itself, as on several machines: the supervisor would not start a second learner.
"""

import json
import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from palimpsest.common.files import write
from tests.runs.fencing import check_whole, stored
from tests.runs.run_process import history, newest_manifest, scripted
from tests.runs.unsupervised import WITHIN_S, Process, Services

pytestmark = pytest.mark.servers
PLACE = "learner.after_step"
"""Failpoint (common/failpoints.py) at whose second visit learners pause."""
VERSIONS = 6


@pytest.fixture
def services(tmp_path: Path, starting_model: Path) -> Iterator[Services]:
    toml = scripted(tmp_path, starting_model, versions=VERSIONS)
    made = Services(toml, tmp_path / "scripted")
    write(made.home / "run.toml", toml.read_bytes())  # as `palimpsest run` would: the audit reads it
    yield made
    made.end()


def begun(services: Services, *, fault: str = "") -> None:
    """Start all services but the learner."""
    services.start("snapshot_store", "snapshot_store", fault=fault)
    services.start("env_gateway", "env_gateway", fault=fault)
    services.start("rollout", "rollout", f"--rollout.port={services.ports['rollout']}", fault=fault)
    services.until(lambda: services.status("snapshot_store").get("waiting_for", "") is None, "the store")


def paused(services: Services, learner: Process, place: str) -> None:
    """Wait until the learner has paused at its failpoint."""

    def stopped() -> bool:
        assert learner.poll() is None, services.log(place).read_text()[-3000:]
        return psutil.Process(learner.pid).status() == psutil.STATUS_STOPPED

    services.until(stopped, f"the pause at {place}")


def trained_on(home: Path, writer: int, versions: int) -> bool:
    """True if this learner has stored something and the run has more than `versions` versions."""
    return bool(stored(home, writer)) and len(history(home)) > versions


def woken(services: Services, learner: Process, place: str, epoch: int) -> None:
    """Resume the replaced learner, and assert that it ends with the error message."""
    learner.send_signal(signal.SIGCONT)
    assert learner.wait(timeout=WITHIN_S) == 6, services.log(place).read_text()[-3000:]
    text = services.log(place).read_text()
    assert f"another learner took over this run: writer {epoch} (" in text
    assert f") was replaced by writer {epoch + 1} (" in text
    assert "Traceback" not in text


def test_a_learner_replaced_during_a_pause_ends_without_further_effect(services: Services) -> None:
    begun(services)
    first = services.learner("first", fault=f"{PLACE}:2:STOP")
    paused(services, first, "first")
    before, trained = stored(services.home, 1), len(history(services.home))
    second = services.learner("second")
    services.until(partial(trained_on, services.home, 2, trained), "the second")
    woken(services, first, "first", 1)
    assert second.wait(timeout=WITHIN_S) == 0, services.log("second").read_text()[-3000:]
    check_whole(services.home, {1: before})
    assert len(history(services.home)) == VERSIONS
    assert newest_manifest(services.home)["writer"] == 2


def test_all_ranks_of_a_replaced_learner_end_and_the_refusal_records_the_code(services: Services) -> None:
    begun(services)
    launcher = services.ranks("ranks", 2, fault=f"{PLACE}:2:STOP")
    services.until(lambda: bool(stopped(launcher)), "the pause of rank 0")
    (first,) = stopped(launcher)
    family = psutil.Process(launcher.pid).children(recursive=True)
    assert len(family) == 2
    trained = len(history(services.home))
    second = services.learner("the last")
    services.until(partial(trained_on, services.home, 2, trained), "the second")
    first.send_signal(signal.SIGCONT)
    assert launcher.wait(timeout=WITHIN_S) != 0
    assert psutil.wait_procs(family, timeout=WITHIN_S)[1] == []
    refusal = json.loads((services.home / "refusals" / "learner.json").read_text())
    assert refusal["code"] == 6
    assert launcher.pid in refusal["processes"]
    assert "another learner took over this run: writer 1 (" in refusal["message"]
    assert "Traceback" not in services.log("ranks").read_text().partition("torch/distributed")[0]
    assert second.wait(timeout=WITHIN_S) == 0
    check_whole(services.home, {})


def stopped(launcher: Process) -> list[psutil.Process]:
    """Paused ranks of the launcher."""
    assert launcher.poll() is None
    paused = []
    for child in psutil.Process(launcher.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a rank starts short programs while it imports torch
            if child.status() == psutil.STATUS_STOPPED:
                paused.append(child)
    return paused
