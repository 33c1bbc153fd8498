"""Reads the rows of a dataset: a JSONL or Parquet file, or a folder in a form of Hugging Face.

A folder is a copy of a dataset repository (the files of a split are named after it, such as test.jsonl or
data/train-00000-of-00002.parquet) or what `save_to_disk` of the library `datasets` writes. Parquet and Arrow files need
the extra palimpsest[datasets].
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from palimpsest.common.user_error import UserError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".parquet")
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation"}
SPLITS |= {"dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
"""Words in the name of a file -> its split, as the Hub names them."""


def read_rows(source: str | Path | Mapping[str, str | Path]) -> dict[str, list[Row]]:
    """Return the rows of each split. source: a file, a folder, or split -> file. Raises UserError."""
    if isinstance(source, Mapping):
        found = {str(split): _file(Path(path)) for split, path in source.items()}
    elif (path := Path(source)).is_dir():
        found = _folder(path)
    else:
        found = {"train": _file(path)}
    for split, rows in found.items():
        if not rows:
            raise UserError(f"dataset {source}: split {split} has no rows")
    if not found:
        raise UserError(f"dataset {source}: no split is named")
    return found


def _file(path: Path) -> list[Row]:
    if not path.is_file():
        raise UserError(f"dataset {path.absolute()}: there is no such file")
    if path.suffix == ".jsonl":
        return list(_jsonl(path))
    if path.suffix == ".parquet":
        return _parquet(path)
    raise UserError(f"dataset {path}: the name must end in {' or '.join(SUFFIXES)}, or be a folder")


def _jsonl(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"dataset {path}: it is not UTF-8: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"dataset {path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"dataset {path}, line {number}: a row is a JSON object, not {line.strip()[:60]}")
        yield row


def _parquet(path: Path) -> list[Row]:
    _arrow(path)
    from pyarrow import ArrowException, parquet

    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"dataset {path}: it cannot be read as Parquet: {error}") from None
    return rows


def _folder(folder: Path) -> dict[str, list[Row]]:
    if (folder / "dataset_dict.json").is_file():
        names = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        return {name: _saved(folder / name) for name in names}
    if (folder / "state.json").is_file():
        return {"train": _saved(folder)}
    found: dict[str, list[Row]] = {}
    unnamed: list[str] = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
        words = re.split(r"[^a-z0-9]+", str(path.relative_to(folder)).lower())
        splits = {SPLITS[word] for word in words if word in SPLITS}
        if len(splits) == 1:
            found.setdefault(splits.pop(), []).extend(_file(path))
        else:
            unnamed.append(str(path.relative_to(folder)))
    if unnamed and (found or len(unnamed) > 1):
        raise UserError(f"dataset {folder}: the name of {unnamed[0]} has no split; pass {{'train': 'FILE', ...}}")
    if not found and not unnamed:
        raise UserError(f"dataset {folder}: the folder has no file that ends in {' or '.join(SUFFIXES)}")
    return found or {"train": _file(folder / unnamed[0])}


def _saved(folder: Path) -> list[Row]:
    """Return the rows of one split that `save_to_disk` wrote."""
    _arrow(folder)
    from pyarrow import ArrowException, ipc

    rows: list[Row] = []
    try:
        files = [folder / one["filename"] for one in json.loads((folder / "state.json").read_text())["_data_files"]]
        for path in files:
            with path.open("rb") as file:
                rows += ipc.open_stream(file).read_all().to_pylist()
    except (ArrowException, OSError, KeyError, ValueError) as error:
        raise UserError(f"dataset {folder}: it cannot be read: {type(error).__name__}: {error}") from None
    return rows


def _arrow(path: Path) -> ModuleType:
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise UserError(f"dataset {path}: it needs pyarrow; install palimpsest[datasets], or use JSONL") from None
    module: ModuleType = pyarrow
    return module
