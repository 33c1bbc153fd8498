"""What is got into the cache is whole or absent, and got once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from palimpsest.common.user_error import ExitCode, UserError
from tools.backends import cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(partial: Path) -> None:
    (partial / "whole").write_text("yes")


def silent(_text: str) -> None:
    pass


def test_the_cache_is_where_it_is_named_else_in_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.folder() == tmp_path / "cache"
    monkeypatch.delenv("PALIMPSEST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "palimpsest"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "palimpsest"


def test_what_is_there_is_not_made_again(own_cache: Path) -> None:
    made = [cache.made("thing-1", fill, silent) for _ in range(2)]
    assert made == [own_cache / "thing-1"] * 2
    assert (made[0] / "whole").read_text() == "yes"
    assert cache.made("thing-1", lambda _partial: pytest.fail("made again"), silent) == made[0]


def test_what_failed_half_way_is_absent_and_made_anew(own_cache: Path) -> None:
    def fail(partial: Path) -> None:
        (partial / "half").write_text("no")
        raise UserError("no connection")

    with pytest.raises(UserError, match="no connection"):
        cache.made("thing-1", fail, silent)
    assert not (own_cache / "thing-1").exists()
    assert [file.name for file in cache.made("thing-1", fill, silent).iterdir()] == ["whole"]


def test_two_at_once_make_it_once_and_the_second_says_that_it_waits() -> None:
    makes: list[Path] = []
    waits = threading.Event()

    def make(partial: Path) -> None:
        makes.append(partial)
        assert waits.wait(10)  # the other is at the lock now
        fill(partial)

    with ThreadPoolExecutor(2) as threads:
        made = [threads.submit(cache.made, "thing-1", make, lambda _text: waits.set()) for _ in range(2)]
        folders = {future.result(20) for future in made}
    assert len(makes) == len(folders) == 1


def test_a_cache_that_cannot_be_written_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="PALIMPSEST_CACHE") as refusal:
        cache.made("thing-1", fill, silent)
    assert refusal.value.code == ExitCode.UNAVAILABLE
