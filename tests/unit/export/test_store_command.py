"""`palimpsest store`: lists, shows, checks, exports and imports versions, deltas included."""

import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from palimpsest import store_command
from palimpsest.common.service import Server
from palimpsest.common.snapshots.chain import ChainCost
from palimpsest.common.snapshots.client import ParentWeights, RawTensor, SnapshotClient
from palimpsest.common.snapshots.manifest import Parent
from palimpsest.common.snapshots.writer import Writer
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store.app import create_app
from palimpsest.services.snapshot_store.storage_disk import DiskStorage
from tests.learner_parts.rank_threads import ShardedStore
from tests.records.stored_runs import a_run


def weights(version: int) -> np.ndarray:
    raw = np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8)
    raw.view(np.uint16)[: 20 * version] += 1
    return raw


@pytest.fixture(params=["one object", "parts"])
def home(tmp_path: Path, starting_model: Path, request: pytest.FixtureRequest) -> Path:
    """A run with versions 0 to 2, of which 1 and 2 are deltas, stored by one rank or by two."""
    home = a_run(tmp_path / "first", starting_model)
    fill(home, 3, in_parts=request.param == "parts")
    return home


def fill(home: Path, versions: int, *, in_parts: bool = False) -> None:
    with (
        Server(
            create_app(DiskStorage(home / "snapshots"), sweep_s=3600), "127.0.0.1", 0, key="snapshot_store"
        ) as server,
        SnapshotClient(f"http://127.0.0.1:{server.port}") as client,
    ):
        Writer(client).begin()
        parent, ranks = None, None
        for version in range(versions):
            raw = weights(version)
            if in_parts:
                own = {"w": raw, "v": raw.view(np.uint16)[::-1].copy().view(np.uint8)}
                tensors = [RawTensor(name, "bfloat16", (2000,), part) for name, part in own.items()]
                ranks = ranks or ShardedStore(client, tensors, run=home.name)
                manifest = ranks.put(version, tensors)
                assert len(set(manifest.objects)) == 2
                continue
            manifest = client.put(
                home.name, Version(version), [RawTensor("w", "bfloat16", (2000,), raw)], [], writer=1, parent=parent
            )
            cost = parent.cost if parent else ChainCost(manifest.object_size)
            parent = ParentWeights(Parent(Version(version), manifest.digest), {"w": raw}, cost.after(manifest))
        assert manifest.encoding == ("delta" if versions > 1 else "slices")


def lines(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    capsys.readouterr()
    store_command.store([str(word) for word in words])
    return capsys.readouterr().out.splitlines()


def test_versions_are_listed_and_shown(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = lines(capsys, "ls", home)
    assert [line.split()[0] for line in listed[:3]] == ["0", "1", "2"]
    assert "in full" in listed[0]
    assert "delta to 1" in listed[2]
    shown = lines(capsys, "show", home, 2)
    assert any(line.startswith("chain    2 <- 1 <- 0: ") for line in shown)
    assert any(line.startswith("  w  bfloat16 [2000]  ") for line in shown)
    objects = {line.split()[1].rstrip(",") for line in shown if line.startswith("object ")}
    assert objects <= {path.name for path in (home / "snapshots" / "objects").iterdir()}
    assert objects


def test_a_flipped_bit_in_any_object_damages_the_versions_that_need_it(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [line.partition(":")[2] for line in lines(capsys, "verify", home)] == [" every digest is right"] * 3
    for path in sorted((home / "snapshots" / "objects").iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UserError, match="damaged") as error:
            lines(capsys, "verify", home)
        assert error.value.code is ExitCode.DAMAGED
        path.write_bytes(whole)
    assert len(lines(capsys, "verify", home, 2)) == 1


def test_a_hole_in_a_chain_is_damage_and_does_not_hide_the_other_versions(
    tmp_path: Path, starting_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = a_run(tmp_path / "first", starting_model)
    fill(home, 4)
    archive = tmp_path / "three.tar"
    lines(capsys, "export", home, 3, archive)
    (home / "snapshots" / "versions" / "00000001.json").unlink()
    for words in (["show", home, 3], ["export", home, 3, tmp_path / "none.tar"], ["verify", home]):
        capsys.readouterr()
        with pytest.raises(UserError) as error:
            store_command.store([str(word) for word in words])
        assert error.value.code is ExitCode.DAMAGED
    judged = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1] for line in judged] == [" every digest is right", " DAMAGED", " DAMAGED"]
    assert "version 3 is stored as a delta that needs version 1, which is not in" in judged[2]
    assert lines(capsys, "import", home, archive) == ["1 version added, 3 were there"]
    assert len(lines(capsys, "verify", home)) == 4


def test_a_damaged_manifest_is_one_line_of_the_list(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / "snapshots" / "versions" / "00000001.json"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"^1 version damaged: 1$") as error:
        lines(capsys, "ls", home)
    assert error.value.code is ExitCode.DAMAGED
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[:3]] == ["0", "1", "2"]
    assert "DAMAGED" in listed[1]


@pytest.mark.parametrize("fault", ["missing", "truncated", "swapped"])
def test_an_import_restores_the_objects_of_versions_that_are_there(
    home: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "two.tar"
    lines(capsys, "export", home, 2, archive)
    objects = sorted((home / "snapshots" / "objects").iterdir(), key=lambda path: path.stat().st_size)
    first, other = objects[-1], objects[-2]
    whole = first.read_bytes(), other.read_bytes()
    if fault == "missing":
        first.unlink()
    else:
        first.write_bytes(whole[0][:-1] if fault == "truncated" else whole[1])
    if fault == "swapped":
        other.write_bytes(whole[0])
    with pytest.raises(UserError, match="3 versions damaged: 0, 1, 2"):
        lines(capsys, "verify", home)
    assert lines(capsys, "import", home, archive)[0].startswith("0 versions added, ")
    assert (first.read_bytes(), other.read_bytes()) == whole
    assert len(lines(capsys, "verify", home)) == 3


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("damaged", [b"", b"{}", b"\xff", b'{"digest": "0", "manifest": {}}'])
def test_an_import_replaces_a_damaged_manifest(
    home: Path, tmp_path: Path, version: int, damaged: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "two.tar"
    lines(capsys, "export", home, 2, archive)
    path = home / "snapshots" / "versions" / f"{version:08d}.json"
    whole = path.read_bytes()
    path.write_bytes(damaged)
    assert lines(capsys, "import", home, archive) == ["0 versions added, 2 were there, 1 were restored"]
    assert path.read_bytes() == whole
    assert len(lines(capsys, "verify", home)) == 3


def test_a_damaged_manifest_is_not_replaced_by_other_weights_than_its_delta_names(
    home: Path, tmp_path: Path, starting_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    other, archive = a_run(tmp_path / "elsewhere" / "first", starting_model), tmp_path / "other.tar"
    with (
        Server(create_app(DiskStorage(other / "snapshots"), sweep_s=3600), "127.0.0.1", 0, key="") as server,
        SnapshotClient(f"http://127.0.0.1:{server.port}") as client,
    ):
        Writer(client).begin()
        client.put("first", Version(0), [RawTensor("w", "bfloat16", (2000,), weights(9))], [], writer=1)
    lines(capsys, "export", other, 0, archive)
    path = home / "snapshots" / "versions" / "00000000.json"
    path.write_bytes(b"{}")
    with pytest.raises(UserError, match="version 1 of the store is a delta to other weights of version 0"):
        lines(capsys, "import", home, archive)
    assert path.read_bytes() == b"{}"


def test_an_archive_goes_through_a_pipe(home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store_command.store(["export", str(home), "2", str(tmp_path / "two.tar")])
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        received = pool.submit((tmp_path / "pipe").read_bytes)
        capfd.readouterr()
        store_command.store(["export", str(home), "2", str(tmp_path / "pipe")])
    assert capfd.readouterr().out == "", "the standard output may be the pipe"
    with tarfile.open(tmp_path / "two.tar") as file, tarfile.open(fileobj=io.BytesIO(received.result())) as piped:
        assert [member.name for member in piped] == [member.name for member in file]


def test_an_export_onto_a_folder_names_the_folder(home: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        store_command.store(["export", str(home), "2", str(tmp_path / "taken")])
    assert error.value.filename == str(tmp_path / "taken")
    assert list((tmp_path / "taken").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["import", "HOME", "HOME/none.tar"], "none.tar: no such file"),
        (["import", "HOME", "HOME"], "first: not a file"),
        (["ls", "HOME", "--json"], "palimpsest store --json: there is no such flag"),
        (["verify", "HOME"], "run first has published no version"),
    ],
)
def test_what_is_not_there_is_named(words: list[str], message: str, tmp_path: Path, starting_model: Path) -> None:
    home = a_run(tmp_path / "first", starting_model)
    with pytest.raises(UserError, match=message) as error:
        store_command.store([word.replace("HOME", str(home)) for word in words])
    assert error.value.code is ExitCode.CONFIGURATION


def test_a_version_moves_to_another_store_with_its_chain(
    home: Path, tmp_path: Path, starting_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "two.tar"
    assert "3 versions" in lines(capsys, "export", home, 2, archive)[0]
    (tmp_path / "elsewhere").mkdir()
    other = a_run(tmp_path / "elsewhere" / "first", starting_model)
    assert lines(capsys, "import", other, archive) == ["3 versions added, 0 were there"]
    assert lines(capsys, "import", other, archive) == ["0 versions added, 3 were there"]
    assert lines(capsys, "ls", other) == lines(capsys, "ls", home)
    assert len(lines(capsys, "verify", other)) == 3


@pytest.mark.parametrize("place", [10, 600, 3000])
def test_a_damaged_archive_is_refused(
    home: Path, tmp_path: Path, starting_model: Path, place: int, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "two.tar"
    lines(capsys, "export", home, 2, archive)
    body = bytearray(archive.read_bytes())
    body[place] ^= 1
    archive.write_bytes(body)
    (tmp_path / "elsewhere").mkdir()
    other = a_run(tmp_path / "elsewhere" / "first", starting_model)
    with pytest.raises(UserError, match="is not a file of `palimpsest store export`") as error:
        lines(capsys, "import", other, archive)
    assert error.value.code is ExitCode.DAMAGED
    if (other / "snapshots" / "versions").exists():
        lines(capsys, "verify", other)


def test_an_archive_of_another_run_is_refused(
    home: Path, tmp_path: Path, starting_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "two.tar"
    lines(capsys, "export", home, 2, archive)
    other = a_run(tmp_path / "second", starting_model)
    with pytest.raises(UserError, match="belongs to run first, not second"):
        lines(capsys, "import", other, archive)


@pytest.mark.parametrize("words", [[], ["ls"], ["show", "runs/x"], ["ls", "runs/x", "3"], ["copy", "runs/x"]])
def test_a_wrong_command_line_prints_the_usage(words: list[str]) -> None:
    with pytest.raises(UserError, match="usage: palimpsest store ls"):
        store_command.store(words)


@pytest.mark.parametrize("words", [["runs/x"], ["runs/x", "1", "--forever"], ["runs/x", "one"]])
def test_a_wrong_pin_is_refused(words: list[str]) -> None:
    with pytest.raises(UserError):
        store_command.pin(words)


def test_a_version_of_a_served_store_is_pinned_and_released(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = create_app(DiskStorage(home / "snapshots"), sweep_s=3600)
    with Server(app, "127.0.0.1", 0, key="snapshot_store") as server:
        url = f"http://127.0.0.1:{server.port}"
        store_command.pin([url, "1", "--name=best"])
        assert "pinned: best" in lines(capsys, "ls", home)[1]
        store_command.pin([url, "1", "--name=best", "--release"])
        assert "pinned" not in lines(capsys, "ls", home)[1]
        with pytest.raises(UserError, match="version_missing"):
            store_command.pin([url, "9"])
