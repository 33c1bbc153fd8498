"""The audit of a real run: it finds no inconsistency until a file is edited, and then names it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from palimpsest.common.bus.port import Outgoing
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.messages import DEAD_LETTERS, TRAJECTORIES, decode
from tests.runs.run_process import ROOT, RunProcess, history, newest_manifest, scripted, wait_for

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, starting_model: Path) -> Path:
    """Folder of a finished run with garbage records and replayed dead letters. Tests must not change it."""
    folder = tmp_path_factory.mktemp("audited")
    home = folder / "scripted"
    # with max_staleness 0 no trajectory goes stale, so the set of trained trajectories is known
    toml = scripted(folder, starting_model, versions=30, tokens_per_s=200.0)
    process = RunProcess(toml, "--learner.max_staleness=0")
    wait_for(lambda: len(history(home)) >= 1, process, name="version 1")
    (worker,) = process.services()["rollout"]
    worker.suspend()  # the run must not end meanwhile
    bus = SqliteBus(home / "bus.sqlite")
    bus.publish(TRAJECTORIES, [Outgoing("g000001", b"\x00 garbage", {"trajectory": "g000001/1"}), Outgoing("?", b"")])
    wait_for(lambda: len(letters(bus)) == 2, process, name="two dead letters")
    live = audit(home)
    assert live.returncode == 0, live.stdout
    sent = program("palimpsest.services.learner", "dead-letters", "replay", home / "run.toml", "--cause=undecodable")
    assert sent.stdout.splitlines()[-1] == "sent 2 records", sent.stdout
    wait_for(lambda: len(letters(bus)) == 4, process, name="the same two again")
    worker.resume()
    bus.close()
    code, output = process.finish()
    assert code == 0, output[-3000:]
    return home


@pytest.fixture
def home(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that tests may change."""
    return Path(shutil.copytree(run, tmp_path / "scripted"))


def letters(bus: SqliteBus) -> list[object]:
    with bus.consumer(DEAD_LETTERS) as consumer:
        return [decode(DEAD_LETTERS, record.body) for record in consumer.poll(limit=99, timeout_s=0)]


def program(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def audit(home: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return program("palimpsest", "audit", home, *flags)


def test_an_unchanged_run_has_no_inconsistencies(run: Path) -> None:
    done = audit(run)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    lines = done.stdout.splitlines()
    assert lines[0] == "Run scripted"
    assert lines[-1] == "No inconsistencies found."
    (sums,) = [line for line in lines if line.startswith("trajectories")]
    assert "= 480 trained + 0 dropped + " in sums
    assert "  dead letters: 4 undecodable (`palimpsest dead-letters list` has details)" in lines
    (checkpoint,) = [line for line in lines if line.startswith("checkpoint")]
    assert "is in force: version 30, 30 versions trained, by writer 1 of 1" in checkpoint
    assert not [line for line in lines if line.startswith("note")]


def test_the_run_file_names_the_run_too_and_json_has_the_values(run: Path) -> None:
    done = program("palimpsest", "audit", run / "run.toml", "--json", "--quick")
    report = json.loads(done.stdout)
    assert (done.returncode, report["sound"], report["trajectories"]["trained"]) == (0, True, 480)
    assert report["dead_letters"] == {"undecodable": 4}
    assert len(report["notes"]) == 1, "the note names the checks that --quick skips"


def edit_the_ledger(home: Path) -> None:
    newest = max(home.glob("checkpoints/*/manifest.json"))
    newest.write_text(newest.read_text().replace('"trained":480', '"trained":479'))


def edit_it_so_that_its_digest_holds(home: Path) -> None:
    from blake3 import blake3

    edit_the_ledger(home)
    newest = max(home.glob("checkpoints/*/manifest.json"))
    commit = home / "snapshots" / "checkpoints" / f"{newest.parent.name}.json"
    commit.write_text(json.dumps({"digest": blake3(newest.read_bytes()).hexdigest()}))


def tear_the_state(home: Path) -> None:
    state = max(home.glob("checkpoints/*/state.safetensors"))
    body = bytearray(state.read_bytes())
    body[len(body) // 2] ^= 1
    state.write_bytes(body)


def forget_the_commits(home: Path) -> None:
    newest = max(home.glob("snapshots/checkpoints/*.json"))
    newest.unlink()


def newest_version(home: Path) -> Path:
    return max(home.glob("snapshots/versions/*.json"))


def lose_a_version(home: Path) -> None:
    newest_version(home).unlink()


def object_of_newest(home: Path) -> Path:
    name: str = json.loads(newest_version(home).read_text())["manifest"]["object"]
    return home / "snapshots" / "objects" / name


def lose_an_object(home: Path) -> None:
    object_of_newest(home).unlink()


def turn_a_bit_of_an_object(home: Path) -> None:
    body = bytearray(object_of_newest(home).read_bytes())
    body[-1] ^= 1
    object_of_newest(home).write_bytes(body)


def turn_a_bit_of_a_manifest(home: Path) -> None:
    path = newest_version(home)
    path.write_bytes(path.read_bytes().replace(b'"shape"', b'"shale"', 1))


def append_a_line(home: Path) -> None:
    path = home / "history.jsonl"
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[-1])


def spoil_a_line(home: Path) -> None:
    path = home / "history.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"version":3', b'{"version"?3'))


def cut_the_history(home: Path) -> None:
    path = home / "history.jsonl"
    path.write_bytes(path.read_bytes()[:-100])


def remove_the_letters(home: Path) -> None:
    import sqlite3

    with sqlite3.connect(home / "bus.sqlite") as db:
        db.execute("DELETE FROM records WHERE topic = 'dead_letters'")
        db.execute("UPDATE ends SET next = 0 WHERE topic = 'dead_letters'")


@pytest.mark.parametrize(
    ("meddle", "kind", "message"),
    [
        (edit_the_ledger, "checkpoint_damaged", "its manifest is not the one that the store accepted"),
        (edit_it_so_that_its_digest_holds, "recount", "counts 479 trajectories as trained, history.jsonl lists 480"),
        (tear_the_state, "checkpoint_damaged", "its state does not match its digest"),
        (forget_the_commits, "checkpoint_unknown", "is newer than any that the store accepted"),
        (
            lose_a_version,
            "version_missing",
            "version 30 was announced and is not in the store, although the lease of learner",
        ),
        (lose_an_object, "object_damaged", "is not in the store"),
        (turn_a_bit_of_an_object, "object_damaged", "have the digest"),
        (turn_a_bit_of_a_manifest, "version_damaged", "version 30 (versions/00000030.json)"),
        (append_a_line, "history_tail", "has 1 line after checkpoint 00000030-00000001"),
        (spoil_a_line, "history_damaged", "history.jsonl, line 4: "),
        (cut_the_history, "history_damaged", "bytes, the checkpoint counts"),
        (remove_the_letters, "letters_missing", "have no dead letter, trajectories["),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_each_edited_file_gives_a_finding_with_a_remedy(
    home: Path, meddle: Callable[[Path], None], kind: str, message: str
) -> None:
    meddle(home)
    done = audit(home)
    assert done.returncode == 1, done.stdout + done.stderr
    (found, *_) = [line for line in done.stdout.splitlines() if f". {kind}: " in line and message in line]
    assert "restore" in found or "continue from" in found, "a remedy"


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    done = audit(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "not the folder of a run" in done.stderr


def test_the_newest_manifest_is_the_checkpoint_in_force(run: Path) -> None:
    report = json.loads(audit(run, "--json", "--quick").stdout)
    assert newest_manifest(run)["trained_versions"] == report["checkpoint"]["trained_versions"] == 30
