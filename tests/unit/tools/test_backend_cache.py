"""An entry of the cache is complete or absent, and is made once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from palimpsest.common.user_error import ExitCode, UserError
from tests.processes.waiting import LIMIT_S
from tools.backends import cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for this test."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(partial: Path) -> None:
    (partial / "whole").write_text("yes")


def no_output(_text: str) -> None:
    pass


def test_the_cache_folder_comes_from_the_environment_or_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache.folder() == tmp_path / "cache"
    monkeypatch.delenv("PALIMPSEST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "palimpsest"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "palimpsest"


def test_an_existing_entry_is_not_made_again(own_cache: Path) -> None:
    made = [cache.made("thing-1", fill, no_output) for _ in range(2)]
    assert made == [own_cache / "thing-1"] * 2
    assert (made[0] / "whole").read_text() == "yes"
    assert cache.made("thing-1", lambda _partial: pytest.fail("made again"), no_output) == made[0]


def test_a_failed_entry_is_absent_and_made_by_the_next_call(own_cache: Path) -> None:
    def fail(partial: Path) -> None:
        (partial / "half").write_text("no")
        raise UserError("no connection")

    with pytest.raises(UserError, match="no connection"):
        cache.made("thing-1", fail, no_output)
    assert not (own_cache / "thing-1").exists()
    assert [file.name for file in cache.made("thing-1", fill, no_output).iterdir()] == ["whole"]


def test_two_concurrent_calls_make_an_entry_once_and_the_second_reports_its_wait() -> None:
    makes: list[Path] = []
    waits = threading.Event()

    def make(partial: Path) -> None:
        makes.append(partial)
        assert waits.wait(LIMIT_S)  # the other thread waits for the lock
        fill(partial)

    with ThreadPoolExecutor(2) as threads:
        made = [threads.submit(cache.made, "thing-1", make, lambda _text: waits.set()) for _ in range(2)]
        folders = {future.result(LIMIT_S) for future in made}
    assert len(makes) == len(folders) == 1


def test_an_unwritable_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="PALIMPSEST_CACHE") as error:
        cache.made("thing-1", fill, no_output)
    assert error.value.code == ExitCode.UNAVAILABLE
