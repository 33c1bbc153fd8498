"""The history file: one line per version, written by the newest learner only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.learner.observability.history import NEWEST, History


def test_the_history_is_truncated_to_the_checkpoints_length(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl", length=0)
    history.add({"version": 0})
    counted = history.length
    history.add({"version": 1})
    history.close()
    again = History(tmp_path / "history.jsonl", length=counted)
    assert again.length == counted
    again.add({"version": 1, "again": True})
    again.close()
    assert (tmp_path / "history.jsonl").read_text() == '{"version":0}\n{"version":1,"again":true}\n'


def test_lines_of_a_replaced_learner_are_not_in_the_history(tmp_path: Path) -> None:
    replaced = History(tmp_path / "history.jsonl", length=0)
    replaced.add({"version": 0})
    successor = History(tmp_path / "history.jsonl", length=replaced.length)
    replaced.add({"version": 1, "by": "the replaced one"})
    successor.add({"version": 1, "by": "its successor"})
    replaced.add({"version": 2, "by": "the replaced one"})
    text = (tmp_path / "history.jsonl").read_text()
    assert text == '{"version":0}\n{"version":1,"by":"its successor"}\n'
    assert successor.length == len(text)


def test_followers_get_the_newest_lines_and_each_line_that_is_added(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(b"".join(b'{"version":%d}\n' % version for version in range(NEWEST + 2)))
    follower = Recorded()
    history = History(path, length=path.stat().st_size, followers=(follower,))
    assert (len(follower.newest), follower.newest[0]) == (NEWEST, {"version": 2})
    history.add({"version": NEWEST + 2})
    assert follower.added == [{"version": NEWEST + 2}]


class Recorded:
    def __init__(self) -> None:
        self.newest: Sequence[Mapping[str, Any]] = ()
        self.added: list[Mapping[str, Any]] = []

    def begin(self, newest: Sequence[Mapping[str, Any]]) -> None:
        self.newest = newest

    def add(self, line: Mapping[str, Any]) -> None:
        self.added.append(line)


@pytest.mark.parametrize("there", [None, b"", b'{"version":0}'])
def test_a_history_shorter_than_the_checkpoints_length_is_refused(tmp_path: Path, there: bytes | None) -> None:
    path = tmp_path / "history.jsonl"
    if there is not None:
        path.write_bytes(there)
    with pytest.raises(UserError, match=f"holds {len(there or b'')} bytes, but the checkpoint counts 14") as error:
        History(path, length=14)
    assert error.value.code is ExitCode.DAMAGED
