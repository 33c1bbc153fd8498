"""The digest of a base model, and the refusal of versions with another base."""

import shutil
from pathlib import Path

import pytest
from msgspec import UNSET

from palimpsest.common.base_model import base_digest
from palimpsest.common.snapshots.adapter import Adapter, refuse_other_adapter
from palimpsest.common.user_error import UserError

OWN = Adapter("b" * 64, 8, 16.0, ("q_proj",))


@pytest.fixture
def model(starting_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(starting_model, tmp_path / "model")


def test_a_copy_has_the_same_digest(model: Path, starting_model: Path) -> None:
    assert base_digest(str(model)) == base_digest(str(starting_model))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_changed_byte_changes_the_digest(model: Path, name: str) -> None:
    before, file = base_digest(str(model)), model / name
    body = bytearray(file.read_bytes())
    body[-3] ^= 1
    (model / f"{name}.new").write_bytes(bytes(body))
    if name == "config.json":
        file.write_text(file.read_text().replace('"use_cache": true', '"use_cache": false'))
    else:
        (model / f"{name}.new").replace(file)
    assert base_digest(str(model)) != before


def test_a_folder_without_weights_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        base_digest(str(tmp_path / "none"))


def test_the_same_adapter_and_whole_weights_are_accepted() -> None:
    refuse_other_adapter(OWN, OWN, "version 3")
    refuse_other_adapter(UNSET, None, "version 3")
    refuse_other_adapter(None, None, "checkpoint 3")


@pytest.mark.parametrize(
    ("stored", "own", "message"),
    [
        (Adapter("a" * 64, 8, 16.0, ("q_proj",)), OWN, "version 3 belongs to another base model .*set model.path"),
        (Adapter("b" * 64, 4, 16.0, ("q_proj",)), OWN, r"another form than learner.lora \(rank 4, not 8\)"),
        (UNSET, OWN, "version 3 holds whole weights, but learner.lora.rank is 8"),
        (OWN, None, "version 3 holds an adapter of rank 8: set learner.lora"),
    ],
)
def test_another_base_or_form_is_refused(stored: Adapter, own: Adapter | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        refuse_other_adapter(stored, own, "version 3")
