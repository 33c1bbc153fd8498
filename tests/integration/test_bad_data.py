"""Faults of the disk, store, log, environments and engine of a run.

Either the run continues and accounts for every trajectory, or it ends with an error message and can be resumed.
"""

import json
import re
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.bus.port import Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import (
    CONTROL,
    DEAD_LETTERS,
    TASKS,
    TRAJECTORIES,
    WORKERS,
    DropReason,
    TrajectoryDropped,
    TrajectoryFinished,
    decode,
)
from palimpsest.common.rejected_record import RejectCause
from tests.runs.run_process import RunProcess, check_ledger, history, newest_manifest, scripted, wait_for

pytestmark = pytest.mark.servers
PLUGINS = "tests.unit.env_gateway.plugins.awkward"
AWKWARD = {
    "raises": "Raises",
    "raises_at_reset": "RaisesAtReset",
    "hangs": "Hangs",
    "exits": "Exits",
    "not_a_number": "NotANumber",
    "nothing": "ReturnsNone",
}
"""Failing environments -> their classes."""
GARBAGE = (b"\x00 garbage", b"\xff garbage", b"")


class Disk:
    """A folder whose disk a test can fill: a small tmpfs, if this process may mount one.

    Otherwise a limit on the size of the learner's files replaces it: writes fail in the same way.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mount = [shutil.which("mount") or "false", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
        self.own = subprocess.run(mount, capture_output=True).returncode == 0
        self.says = "the disk is full" if self.own else "a file reached the size limit (ulimit -f)"

    def fill(self, run: RunProcess) -> None:
        """Leave too little space for the next checkpoint."""
        if self.own:
            with (self.folder / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
                while ballast.write(bytes(1 << 16)):
                    pass
        else:
            (state, *_) = self.folder.glob("*/checkpoints/*/state.safetensors")
            for process in run.services()["learner"]:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (state.stat().st_size - 1, resource.RLIM_INFINITY))

    def free(self) -> None:
        """Free the space."""
        (self.folder / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount the folder."""
        if self.own:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.close()


Start = Callable[..., RunProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start runs; the fixture kills their remaining processes after the test."""
    started: list[RunProcess] = []

    def start(*arguments: str | Path, environment: dict[str, str] | None = None) -> RunProcess:
        started.append(RunProcess(*arguments, environment=environment))
        return started[-1]

    yield start
    for run in started:
        if run.process.poll() is None:
            run.kill_everything()


def trained(home: Path, versions: int, run: RunProcess) -> None:
    """Wait until `versions` versions are trained."""
    wait_for(lambda: len(history(home)) >= versions, run, name=f"version {versions}")


def records(home: Path, topic: str) -> Iterator[Any]:
    """Every record of the topic on the log."""
    bus = SqliteBus(home / "bus.sqlite")
    with bus.consumer(topic) as consumer:
        while found := consumer.poll(limit=1000, timeout_s=0):
            yield from found
    bus.close()


def letters(home: Path) -> list[Any]:
    """Decoded dead letters of the run."""
    return [decode(DEAD_LETTERS, record.body) for record in records(home, DEAD_LETTERS)]


def refused(run: RunProcess, code: int, *says: str) -> str:
    """Assert that the run ends with this exit code and these texts, without a traceback. Returns its output."""
    ended, output = run.finish()
    assert ended == code, output
    for words in says:
        assert words in output, output
    assert "Traceback" not in output
    return output


def done(run: RunProcess, home: Path, versions: int) -> dict[str, Any]:
    """Assert that the run finishes and its ledger balances. Returns its summary."""
    code, output = run.finish()
    assert code == 0, output
    ledger = check_ledger(home)
    assert len(history(home)) == versions
    summary: dict[str, Any] = json.loads((home / "summary.json").read_text())
    assert summary["finished"]
    assert summary["trajectories"]["trained"] == ledger["trained"]
    return summary


@contextmanager
def truncated(paths: Iterable[Path]) -> Iterator[None]:
    """Truncate these files to their first half inside the block."""
    whole = {path: path.read_bytes() for path in set(paths)}
    for path, body in whole.items():
        path.write_bytes(body[: len(body) // 2])
    yield
    for path, body in whole.items():
        path.write_bytes(body)


def test_a_run_resumes_after_a_full_disk_and_a_damaged_store(
    start: Start, disk: Disk, tmp_path: Path, starting_model: Path
) -> None:
    toml, home = scripted(tmp_path, starting_model, versions=30), disk.folder / "scripted"
    # the decay changes the weights with every version; the store would keep equal weights once
    run = start(toml, f"--run.folder={disk.folder}", "--learner.optimizer.weight_decay=50.0")
    trained(home, 3, run)
    disk.fill(run)
    go_on = f"palimpsest run --resume {home}"
    refused(run, 3, disk.says, f"(writing {disk.folder}/", "and start again", go_on)
    disk.free()
    assert 2 <= len(history(home, newest_manifest(home)["history_bytes"])) < 30
    check_ledger(home)

    older = sorted(home.glob("snapshots/versions/*.json"))[:-1]
    objects = [json.loads(manifest.read_bytes())["manifest"]["object"] for manifest in older]
    with truncated(home / "snapshots" / "objects" / name for name in objects):
        output = refused(start("--resume", home), 4, "estore the store's folder from a copy", go_on)
        assert re.search(r": version \d+: the object [0-9a-f]{12} has \d+ of \d+ bytes: it is truncated", output)
    summary = done(start("--resume", home), home, 30)
    assert summary["exact"]


def test_garbage_on_the_log_and_from_environments_is_accounted_for(
    start: Start, tmp_path: Path, starting_model: Path
) -> None:
    toml, home = scripted(tmp_path, starting_model, versions=24), tmp_path / "scripted"
    plugins = ", ".join(f'{name} = "{PLUGINS}:{class_}"' for name, class_ in AWKWARD.items())
    shares = ", ".join(f"{name} = {1 / len(AWKWARD)}" for name in AWKWARD)
    run = start(
        toml,
        f"--env_gateway.plugins={{ {plugins} }}",
        f"--tasks.environments={{ lookup = 1.0, {shares} }}",
        "--env_gateway.step_limit_s=0.5",
        "--rollout.attempts=2",
    )
    wait_for(lambda: len(list(home.glob("logs/*.log"))) == 4, run, name="the services")
    bus = SqliteBus(home / "bus.sqlite")
    bus.publish(TRAJECTORIES, [Outgoing("g000000", b"\x00 garbage", {"trajectory": "g000000/1"})])
    trained(home, 1, run)
    for topic in (TRAJECTORIES, CONTROL, TASKS, WORKERS):
        bus.publish(topic, [Outgoing("g²", b"\xff garbage", {"trajectory": "g²/²"}), Outgoing("", b"")])
    bus.close()
    wait_for(lambda: len(letters(home)) == 9, run, name="the dead letters")
    summary = done(run, home, 24)

    assert Counter(letter.topic for letter in letters(home)) == {TRAJECTORIES: 3, CONTROL: 2, TASKS: 2, WORKERS: 2}
    assert {letter.body for letter in letters(home)} == set(GARBAGE)
    assert all(letter.reason.startswith(f"{letter.topic}: ") for letter in letters(home))
    assert summary["dead_letters"] == {CONTROL: 2, TASKS: 2, TRAJECTORIES: 3, WORKERS: 2}
    assert {letter.cause for letter in letters(home)} == {RejectCause.UNDECODABLE}
    assert summary["trajectories"]["dead_lettered"] <= 1, (
        "the trajectory that the garbage names, unless it arrived first"
    )

    sound = (record.body for record in records(home, TRAJECTORIES) if record.body not in GARBAGE)
    ended = [decode(TRAJECTORIES, body) for body in sound]
    assert {end.environment for end in ended if isinstance(end, TrajectoryFinished)} == {"lookup"}
    dropped = [end for end in ended if isinstance(end, TrajectoryDropped)]
    assert {end.reason for end in dropped} == {DropReason.ENVIRONMENT_FAILED}
    assert {end.detail.partition(":")[0] for end in dropped} == {
        "environment_raised", "environment_timeout", "environment_crashed", "environment_invalid",
    }  # fmt: skip
    assert summary["trajectories"]["dropped"]["environment_failed"] > 0


def test_an_environment_that_always_fails_ends_the_run(start: Start, tmp_path: Path, starting_model: Path) -> None:
    toml, home = scripted(tmp_path, starting_model, versions=4), tmp_path / "scripted"
    run = start(
        toml, f'--env_gateway.plugins={{ raises = "{PLUGINS}:Raises" }}', "--tasks.environments={ raises = 1.0 }"
    )
    refused(
        run, 3, "learner: ", "trajectories in a row were dropped and none arrived: {'environment_failed': ",
        "Fix the cause, and continue with --resume",
    )  # fmt: skip
    assert history(home) == []
    summary = json.loads((home / "summary.json").read_text())
    assert (summary["versions"], summary["trajectories"]["trained"]) == (0, 0)
    assert "environment_raised: LookupError: no such turn" in (home / "logs" / "worker-0.log").read_text()


def test_an_engine_with_wrong_log_probs_ends_the_run(start: Start, tmp_path: Path, starting_model: Path) -> None:
    toml, home = scripted(tmp_path, starting_model, versions=4), tmp_path / "scripted"
    run = start(toml, environment={"PALIMPSEST_FAULT": "rollout.scripted_canary"})
    refused(
        run, 5, "worker-0: refused version 0: canary error 0.5000 nats exceeds the tolerance",
        "(rollout.canary_tolerance)", f"palimpsest run --resume {home}",
    )  # fmt: skip
    summary = json.loads((home / "summary.json").read_text())
    assert (summary["refused_versions"], summary["canary_error_max"]) == (1, pytest.approx(0.5))
    assert list(records(home, TRAJECTORIES)) == [], "the worker must not publish samples of an unverified version"
