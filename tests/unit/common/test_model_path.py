"""A model path that does not exist is not taken for the hub id of a model."""

from pathlib import Path

import pytest

from palimpsest.common.model_path import refuse_absent
from palimpsest.common.user_error import UserError


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("models/strating", r"models/strating does not exist; did you mean models/starting\?"),
        ("own/qwen", "own/qwen does not exist: a complete model folder"),
        ("./qwen", "qwen does not exist: a complete"),
        ("a/b/c", "a/b/c does not exist: a complete"),
    ],
)
def test_an_absent_folder_is_refused(path: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "starting").mkdir(parents=True)
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        refuse_absent(path)


def test_the_model_of_the_examples_is_built_by_setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="`make setup` builds the starting model"):
        refuse_absent("models/starting")
    with pytest.raises(UserError, match="models/qwen3-4b does not exist"):
        refuse_absent("models/qwen3-4b")


def test_a_hub_id_is_left_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refuse_absent("Qwen/Qwen3-4B")
