"""Reads the recorded batches of a run for `palimpsest rescore`."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


class Lacking(Exception):
    """Raised if there are no values to compare."""


def micro_batches(path: Path) -> list[dict[str, Any]]:
    """Return the micro-batches of a recorded version. Raises Lacking if the record has no layout or is damaged."""
    names = (
        "tokens", "versions", "behavior", "proximal", "current", "temperatures", "lengths", "first", "exact", "passes",
        "trajectories",
    )  # fmt: skip
    with readable_record(path) as file:
        count = sum(name.startswith("tokens_") for name in file.files)
        if lacking := {f"{name}_{i}" for name in names for i in range(count)} - set(file.files):
            raise Lacking(
                f"{path} lacks {min(lacking)}: an older release recorded the run; rescore it with that release"
            )
        return [
            {"now": file["now"], "routes": file[f"routes_{i}"] if f"routes_{i}" in file.files else None}
            | {name: file[f"{name}_{i}"] for name in names}
            for i in range(count)
        ]


@contextmanager
def readable_record(path: Path) -> Iterator[Any]:
    """Open the arrays of a record. Raises Lacking if the file or an array that the block reads is damaged."""
    try:
        with np.load(path) as file:
            yield file
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Lacking(f"{path} is damaged ({error}): restore it from a copy, or remove it to leave it out") from None
