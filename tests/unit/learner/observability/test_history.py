"""The history file: one line per version, written by the newest learner only."""

from pathlib import Path

import pytest

from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.learner.observability.history import History


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


@pytest.mark.parametrize("there", [None, b"", b'{"version":0}'])
def test_a_history_shorter_than_the_checkpoints_length_is_refused(tmp_path: Path, there: bytes | None) -> None:
    path = tmp_path / "history.jsonl"
    if there is not None:
        path.write_bytes(there)
    with pytest.raises(UserError, match=f"holds {len(there or b'')} bytes, but the checkpoint counts 14") as error:
        History(path, length=14)
    assert error.value.code is ExitCode.DAMAGED
