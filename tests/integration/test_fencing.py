"""A learner that was paused and replaced is refused when it wakes, wherever it was paused; its successor trains on.

The services are started one by one, as on several machines: the supervisor would not start a second learner.
"""

import json
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from blake3 import blake3

from common.bus.sqlite import SqliteBus
from common.files import write
from common.messages import CONTROL, DEAD_LETTERS, RunFinished, VersionPublished, decode
from services.learner.progress import complete
from tests.by_hand import WITHIN_S, Process, Services
from tests.runs import check_ledger, history, newest_manifest, scripted

pytestmark = pytest.mark.servers
PLACES = [
    "learner.before_reading",
    "learner.after_step",
    "learner.inside_checkpoint",
    "learner.before_committing",
    "learner.after_committing",
    "learner.before_publishing",
    "learner.before_announcing",
    "learner.after_publishing",
]
"""Where learners are stopped (common/faults.py), each the second time it comes there."""
VERSIONS = 18
SKIP = "store.skip_fencing"
Things = set[tuple[str, int, int]]
"""In the store: `version` or `checkpoint`, its version, its writer."""


@pytest.fixture
def services(tmp_path: Path, starting_model: Path) -> Iterator[Services]:
    toml = scripted(tmp_path, starting_model, versions=VERSIONS)
    made = Services(toml, tmp_path / "scripted")
    write(made.home / "run.toml", toml.read_bytes())  # as `python -m services` would: the audit reads it
    yield made
    made.end()


def begun(services: Services, *, fault: str = "") -> None:
    """Everything but the learner."""
    services.start("snapshot_store", "snapshot_store", fault=fault)
    services.start("env_gateway", "env_gateway", fault=fault)
    services.start("rollout", "rollout", f"--rollout.port={services.ports['rollout']}", fault=fault)
    services.until(lambda: services.status("snapshot_store").get("waiting_for", "") is None, "the store")


def paused(services: Services, learner: Process, place: str) -> None:
    """Wait until the learner stands still at its place."""

    def stopped() -> bool:
        assert learner.poll() is None, services.log(place).read_text()[-3000:]
        return psutil.Process(learner.pid).status() == psutil.STATUS_STOPPED

    services.until(stopped, f"the pause at {place}")


def trained_on(home: Path, writer: int, versions: int) -> bool:
    """Whether this learner has taken over and trained beyond so many versions."""
    return bool(stored(home, writer)) and len(history(home)) > versions


def woken(services: Services, learner: Process, place: str, epoch: int) -> None:
    """The replaced learner goes on, and ends with a sentence."""
    learner.send_signal(signal.SIGCONT)
    assert learner.wait(timeout=WITHIN_S) == 6, services.log(place).read_text()[-3000:]
    said = services.log(place).read_text()
    assert f"another learner took this run over: writer {epoch} (" in said
    assert f") was replaced by writer {epoch + 1} (" in said
    assert "Traceback" not in said


def stored(home: Path, writer: int | None = None) -> Things:
    """Versions and committed checkpoints; those of one writer, or all."""
    manifests = [json.loads(path.read_bytes())["manifest"] for path in home.glob("snapshots/versions/*.json")]
    commits = [path.stem.split("-") for path in home.glob("snapshots/checkpoints/*.json")]
    things = {("version", manifest["version"], manifest["writer"]) for manifest in manifests} | {
        ("checkpoint", int(version), int(writer)) for version, writer in commits
    }
    return {thing for thing in things if writer in (None, thing[2])}


def check_whole(home: Path, before: dict[int, Things]) -> None:
    """What the learners leave is what one would have; `before`: what each had stored when it was replaced."""
    for writer, things in before.items():
        assert stored(home, writer) == things, f"writer {writer} stored something after it was replaced"
    check_ledger(home)
    lines = history(home)
    assert [line["trajectories"]["trained"] for line in lines] == [16 * (i + 1) for i in range(len(lines))]
    commits = {path.stem: json.loads(path.read_bytes())["digest"] for path in home.glob("snapshots/checkpoints/*.json")}
    manifests = {path.name: (path / "manifest.json").read_bytes() for path in complete(home / "checkpoints")}
    assert commits == {name: blake3(manifest).hexdigest() for name, manifest in manifests.items()}
    writers = [writer for _, _, writer in sorted(stored(home), key=lambda thing: thing[1:])]
    assert writers == sorted(writers), "a replaced learner stored a later version than its successor's first"
    bus = SqliteBus(home / "bus.sqlite")
    said = [decode(CONTROL, record.body) for record in everything(bus, CONTROL)]
    announced = [message.version for message in said if isinstance(message, VersionPublished)]
    assert announced == sorted(announced), "an older version was announced after a newer one"
    assert [isinstance(message, RunFinished) for message in said] == [False] * len(announced) + [True]
    assert list(everything(bus, DEAD_LETTERS)) == []
    bus.close()


def everything(bus: SqliteBus, topic: str) -> Iterator[Any]:
    """Every record of the topic."""
    with bus.consumer(topic) as consumer:
        while found := consumer.poll(limit=1000, timeout_s=0):
            yield from found


def test_a_learner_that_was_replaced_while_it_stood_still_ends_and_has_done_nothing(services: Services) -> None:
    """One after another takes the run over, stands still somewhere else, and wakes when the next has trained on."""
    begun(services)
    before: dict[int, Things] = {}
    learner = services.learner(PLACES[0], fault=f"{PLACES[0]}:2:STOP")
    for epoch, (place, following) in enumerate(zip(PLACES, [*PLACES[1:], "the last"], strict=True), start=1):
        paused(services, learner, place)
        before[epoch], trained = stored(services.home, epoch), len(history(services.home))
        successor = services.learner(following, fault=f"{following}:2:STOP")
        services.until(partial(trained_on, services.home, epoch + 1, trained), following)
        woken(services, learner, place, epoch)
        learner = successor
    assert learner.wait(timeout=WITHIN_S) == 0, services.log("the last").read_text()[-3000:]
    check_whole(services.home, before)
    assert len(history(services.home)) == VERSIONS
    assert newest_manifest(services.home)["writer"] == len(PLACES) + 1


def test_without_fencing_the_same_pause_spoils_the_run(services: Services) -> None:
    begun(services, fault=SKIP)
    first = services.learner("learner.after_step", fault=f"{SKIP},learner.after_step:2:STOP")
    paused(services, first, "learner.after_step")
    before = stored(services.home, 1)
    second = services.learner("the last", fault=SKIP)
    services.until(lambda: len(stored(services.home, 2)) > 4, "two versions of the second")
    first.send_signal(signal.SIGCONT)
    services.until(lambda: stored(services.home, 1) > before, "what it stores")
    assert second.wait(timeout=WITHIN_S) is not None
    with pytest.raises(AssertionError) as found:
        check_whole(services.home, {})
    print(found.value)


def test_all_ranks_of_a_replaced_learner_end_and_its_launcher_leaves_the_code(services: Services) -> None:
    begun(services)
    place = "learner.after_step"
    launcher = services.ranks("ranks", 2, fault=f"{place}:2:STOP")
    services.until(lambda: bool(stopped(launcher)), "the pause of rank 0")
    (first,) = stopped(launcher)
    family = psutil.Process(launcher.pid).children(recursive=True)
    assert len(family) == 2
    trained = len(history(services.home))
    second = services.learner("the last")
    services.until(partial(trained_on, services.home, 2, trained), "the second")
    first.send_signal(signal.SIGCONT)
    assert launcher.wait(timeout=WITHIN_S) != 0
    assert psutil.wait_procs(family, timeout=10)[1] == []
    refusal = json.loads((services.home / "refusals" / "learner.json").read_text())
    assert refusal["code"] == 6
    assert launcher.pid in refusal["processes"]
    assert "another learner took this run over: writer 1 (" in refusal["message"]
    assert "Traceback" not in services.log("ranks").read_text().partition("torch/distributed")[0]
    assert second.wait(timeout=WITHIN_S) == 0
    check_whole(services.home, {})


def stopped(launcher: Process) -> list[psutil.Process]:
    """Its ranks that stand still."""
    assert launcher.poll() is None
    children = psutil.Process(launcher.pid).children(recursive=True)
    return [child for child in children if child.status() == psutil.STATUS_STOPPED]
