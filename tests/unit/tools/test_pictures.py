"""The README's picture of the live view, from a small recorded run."""

import re
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from palimpsest.common.bus.port import Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import TOPICS, WORKERS, VersionApplied, WorkerAlive, encode
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from tests.records.history_lines import a_line
from tools.pictures import draw, photograph, state_at

RUN = 'run.id = "small"\nmodel.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 4\n'
VERSIONS = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of four versions of 5 s and 100 tokens each; the worker reports after it applies each version."""
    (tmp_path / "run.toml").write_text(RUN)
    lines = [msgspec.json.encode(a_line(i, successes="0111", trajectories=ledger(i))) for i in range(VERSIONS)]
    (tmp_path / "history.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    (tmp_path / "seconds.json").write_text('{"setup": 30.0, "run": 25.0}')
    bus = SqliteBus(tmp_path / "bus.sqlite")
    bus.create_topics(dict.fromkeys(TOPICS, 1))
    for version in range(1, VERSIONS + 1):
        update = VersionApplied("small", "worker-0", Version(version), "", True, 0.01, 0.052, 0)
        report = WorkerAlive("small", "worker-0", version, 10 + version, 100 * version, 5.0 * version, 0.0)
        bus.publish(WORKERS, [Outgoing("worker-0", encode(update)), Outgoing("worker-0", encode(report))])
    bus.close()
    return tmp_path


def ledger(version: int) -> dict[str, object]:
    """Return the counts after a version: 4 trajectories per batch, 8 pending."""
    trained = 4 * (version + 1)
    return {"offered": trained + 8, "trained": trained, "dropped": {}, "dead_lettered": 0, "pending": 8}


def test_the_state_is_that_of_the_middle_of_the_run(folder: Path) -> None:
    shown = state_at(folder)
    assert (shown.trained_versions, shown.elapsed_s, shown.setup) == (2, 40.0, False)
    assert (shown.in_flight, shown.waiting, shown.ledger["trained"]) == (12, 4, 8)
    assert shown.rollout_tokens_per_s == pytest.approx(20.0)
    assert [service.doing for service in shown.services] == [
        "trains on the batch at version 2",
        "samples with version 2, 12 in flight, last update paused 52 ms",
    ]
    assert shown.warnings == ()


def test_the_drawing_has_the_text_of_the_view_and_loads_no_file(folder: Path) -> None:
    drawn = draw(state_at(folder, 3))
    text = "".join(ElementTree.fromstring(drawn).itertext()).replace("\N{NO-BREAK SPACE}", " ")
    assert "small" in text
    assert "12 trained, 0 dropped, 0 dead-lettered" in text
    assert "samples with version 3, 13 in flight" in text
    assert not re.search(r"@font-face|url\((?!#)", drawn)


def test_the_same_run_gives_the_same_drawing(folder: Path) -> None:
    assert draw(state_at(folder)) == draw(state_at(folder))


@pytest.mark.parametrize("version", [0, 5])
def test_a_version_that_was_not_trained_is_refused(folder: Path, version: int) -> None:
    with pytest.raises(UserError, match=rf"version {version}: the history has versions 1 to 4"):
        state_at(folder, version)


def test_a_run_without_a_report_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"`palimpsest report .*` writes it"):
        photograph("chromium", folder / "report.html", folder / "report.png")
