"""A new folder appears complete or not at all; folders that it may replace."""

import errno
import os
from pathlib import Path

import pytest

from palimpsest.common.user_error import UserError
from palimpsest.export import new_folder as module
from palimpsest.export.new_folder import MARK, new_folder


def an_export(folder: Path, text: str) -> None:
    """Create a folder as an earlier export leaves it."""
    folder.mkdir()
    (folder / "README.md").write_text(f"---\ntags:{MARK}---\n{text}")


def fill(folder: Path, *, overwrite: bool = False) -> None:
    with new_folder(folder, overwrite=overwrite) as partial:
        assert not folder.is_relative_to(partial)
        (partial / "README.md").write_text("new")


@pytest.mark.parametrize("there", [False, True])
def test_the_folder_appears_complete(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "deep" / "model"
    if there:
        folder.mkdir(parents=True)
    with new_folder(folder, overwrite=False) as partial:
        (partial / "README.md").write_text("new")
        assert not (folder / "README.md").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert (folder / "README.md").read_text() == "new"


@pytest.mark.parametrize("end", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_leaves_the_earlier_folder(tmp_path: Path, end: BaseException, overwrite: bool) -> None:
    folder = tmp_path / "model"
    if overwrite:
        an_export(folder, "old")
    before = sorted(tmp_path.rglob("*"))

    def stop_halfway() -> None:
        with new_folder(folder, overwrite=overwrite) as partial:
            (partial / "README.md").write_text("half")
            raise end

    with pytest.raises(type(end)):
        stop_halfway()
    assert sorted(tmp_path.rglob("*")) == before
    assert not overwrite or (folder / "README.md").read_text().endswith("old")


def test_a_full_folder_and_a_file_are_not_replaced(tmp_path: Path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    an_export(full, "old")
    file.write_text("x")
    with pytest.raises(UserError, match=r"full is not empty: .* --overwrite"):
        fill(full)
    with pytest.raises(UserError, match="file is a file: name a new or an empty folder"):
        fill(file, overwrite=True)
    assert (full / "README.md").read_text().endswith("old")


@pytest.mark.parametrize(
    ("name", "text"), [("notes.txt", ""), ("README.md", "---\ntags:\n- other\n---\n"), (".git", None)]
)
def test_only_an_exported_model_is_replaced(tmp_path: Path, name: str, text: str | None) -> None:
    folder = tmp_path / "model"
    if text is None:
        an_export(folder, "old")
        (folder / name).mkdir()
    else:
        folder.mkdir()
        (folder / name).write_text(text)
    with pytest.raises(UserError, match="is not a model that this command wrote"):
        fill(folder, overwrite=True)
    assert (folder / name).exists()


@pytest.mark.parametrize("in_one_step", [True, False])
def test_an_exported_model_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_step: bool) -> None:
    if not in_one_step:  # as on a network file system
        monkeypatch.setattr(module, "_exchange", lambda *_: False)
    folder = tmp_path / "model"
    an_export(folder, "old")
    (folder / "left over").touch()
    fill(folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in folder.iterdir()] == ["README.md"]
    assert (folder / "README.md").read_text() == "new"


def test_folders_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert module._exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "other").exists()
    assert (tmp_path / "other" / "one").exists()
    with pytest.raises(FileNotFoundError):
        module._exchange(tmp_path / "one", tmp_path / "none")


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to("real")
    fill(link)
    assert link.is_symlink()
    assert (tmp_path / "real" / "README.md").read_text() == "new"


def test_a_folder_filled_during_the_export_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(UserError, match="is not empty"), new_folder(folder, overwrite=False):
        an_export(folder, "another's")
    assert (folder / "README.md").read_text().endswith("another's")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_error_of_a_file_names_the_final_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(OSError, match="full") as error, new_folder(folder, overwrite=False) as partial:
        raise OSError(errno.ENOSPC, "full", os.fspath(partial / "model.safetensors"))
    assert error.value.filename == str(folder)
