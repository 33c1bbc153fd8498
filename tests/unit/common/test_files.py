"""Atomic writes: a file is complete or absent."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from palimpsest.common import files
from palimpsest.common.files import atomic_write, write


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Limit the size of files that this process writes, in bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_appears_complete_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write(path, b"body")
    assert path.read_bytes() == b"body"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_the_name_does_not_exist_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write(b"body")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"body"


def test_the_old_file_stays_until_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"old")
    with path.open("rb") as reader:
        with atomic_write(path) as file:
            file.write(b"new, and longer")
            file.flush()
            assert path.read_bytes() == b"old"
        assert path.read_bytes() == b"new, and longer"
        assert reader.read() == b"old"  # a reader that opened the old file still reads it


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_block_leaves_only_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    write(path, b"old")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


def test_a_failed_write_leaves_only_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"old")
    with files_limited_to(4096), pytest.raises(OSError, match="File too large"):
        write(path, bytes(1 << 20))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


def test_a_failed_rename_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write(tmp_path / "folder", b"body")
    assert error.value.filename == str(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("link", ["/proc/self/fd/{}", "{folder}/link", "/dev/fd/{}"])
def test_a_pipe_is_written_to_and_stays(tmp_path: Path, link: str) -> None:
    reader, writer = os.pipe()
    path = Path(link.format(writer, folder=tmp_path))
    if not path.exists():
        path.symlink_to(f"/proc/self/fd/{writer}")
    write(path, b"body")
    os.close(writer)
    assert os.read(reader, 100) == b"body"
    assert path.is_symlink() == (path.parent == tmp_path)  # the link in the folder is not replaced
    os.close(reader)


@pytest.mark.parametrize(("mode", "earlier"), [("wb", b""), ("ab", b"of another program\n")])
def test_the_standard_output_keeps_its_place_also_in_a_file(tmp_path: Path, mode: str, earlier: bytes) -> None:
    program = (
        "import pathlib, sys; from palimpsest.common.files import write\n"
        "print('before'); write(pathlib.Path(sys.argv[1]), b'body\\n'); print('after')"
    )
    link = Path("/dev/stdout").readlink()
    (tmp_path / "out").write_bytes(b"of another program\n")
    with (tmp_path / "out").open(mode) as out:
        subprocess.run([sys.executable, "-c", program, "/dev/stdout"], check=True, cwd=Path.cwd(), stdout=out)
    assert (tmp_path / "out").read_bytes() == earlier + b"before\nbody\nafter\n"
    assert Path("/dev/stdout").readlink() == link


def test_an_error_of_the_temporary_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250)  # with the ending of the temporary file the name is too long
    with pytest.raises(OSError, match="too long") as error:
        write(path, b"body")
    assert error.value.filename == str(path)


def test_a_process_killed_during_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"old")
    dies = (
        "import os, pathlib, signal, sys; from palimpsest.common.files import atomic_write\n"
        "with atomic_write(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", dies, str(path)], check=False, cwd=Path.cwd()).returncode == -9
    assert path.read_bytes() == b"old"


def test_the_bytes_are_synced_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power loss, a name must never refer to unwritten bytes."""
    seen: list[tuple[str, bool]] = []
    real, path = os.fsync, tmp_path / "file"

    def watched(handle: int) -> None:
        target = Path(f"/proc/self/fd/{handle}").readlink()
        seen.append(("folder" if target == tmp_path else "file", path.exists()))
        real(handle)

    monkeypatch.setattr(files.os, "fsync", watched)
    write(path, b"body")
    assert seen == [("file", False), ("folder", True)]
