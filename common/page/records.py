"""Reads recorded batches (`records/*.npz`) trajectory by trajectory, for the page and the report."""

import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

UNTRAINABLE = -1
DIGITS = 5


class TrajectoryOverview(BaseModel):
    """One trajectory of a batch."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    row: int
    """Its number in the batch."""
    trajectory: str
    tokens: int
    """Number of its tokens."""
    removed: int | None
    """Number of tokens that masks and clips removed. None: the batch was recorded without causes."""


class TrajectoryTokens(BaseModel):
    """The tokens of a trajectory, as columns. Log-probs are in nats."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    trajectory: str
    now: int
    """The version trained at."""
    length: int
    """Number of all tokens; the columns may hold fewer."""
    text: list[str]
    versions: list[int]
    """Version that sampled the token; -1 where it is not trained on."""
    behavior: list[float | None]
    proximal: list[float | None]
    current: list[float | None]
    """Before the first optimizer step of the token's minibatch."""
    exact: list[bool]
    """Whether the proximal log-prob is the old one."""
    advantages: list[float | None]
    removed: list[list[str] | None]
    """Causes that removed the token from the loss. None: not recorded."""


def recorded(folder: Path, limit: int) -> list[int]:
    """Return the newest recorded versions, at most `limit`, oldest first."""
    names = (path.stem for path in folder.glob("*.npz"))
    return sorted(int(name) for name in names if name.isdigit())[-limit:]


def overview(folder: Path, version: int, limit: int) -> list[TrajectoryOverview]:
    """Return the first trajectories of a batch. Raises FileNotFoundError if it is not recorded or is damaged."""
    with _Batch(folder, version) as batch:
        found = []
        for row, (part, at) in enumerate(batch.rows()):
            if row == limit:
                break
            removed = batch.column("removed", part)
            found.append(
                TrajectoryOverview(
                    row=row,
                    trajectory=str(batch.column("trajectories", part)[at]),
                    tokens=int(batch.column("lengths", part)[at]),
                    removed=None if removed is None else int((removed[at] != 0).sum()),
                )
            )
    return found


def tokens(folder: Path, version: int, row: int, limit: int, decode: Callable[[int], str]) -> TrajectoryTokens:
    """Return the first tokens of a trajectory. decode: returns the text of a token.

    Raises FileNotFoundError if the batch is not recorded or is damaged, IndexError if it has no such row.
    """
    with _Batch(folder, version) as batch:
        places = list(batch.rows())
        if not 0 <= row < len(places):
            raise IndexError(row)
        part, at = places[row]
        length = int(batch.column("lengths", part)[at])

        def column(name: str) -> NDArray[Any]:
            return np.asarray(batch.column(name, part)[at, : min(length, limit)])

        causes, removed = batch.causes(), batch.column("removed", part)
        bits = None if removed is None else removed[at, :limit]
        return TrajectoryTokens(
            trajectory=str(batch.column("trajectories", part)[at]),
            now=batch.now,
            length=length,
            text=[decode(int(token)) for token in column("tokens")],
            versions=column("versions").tolist(),
            behavior=_numbers(column("behavior")),
            proximal=_numbers(column("proximal"), ~column("missing")),
            current=_numbers(column("current")),
            exact=column("exact").tolist(),
            advantages=_numbers(column("advantages")),
            removed=[
                None if bits is None else [cause for bit, cause in enumerate(causes) if int(bits[i]) >> bit & 1]
                for i in range(min(length, limit))
            ],
        )


_DAMAGE = OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error
"""What numpy and zipfile raise for a file that is no archive, lacks an array, or holds damaged bytes."""


class _Batch:
    """One file, of which an array is read only when it is needed."""

    def __init__(self, folder: Path, version: int) -> None:
        path = folder / f"{version:08d}.npz"
        self._path = path
        try:
            self._file = np.load(path)
        except _DAMAGE as error:
            raise FileNotFoundError(path) from error
        self._read: dict[str, NDArray[Any]] = {}

    def __enter__(self) -> "_Batch":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._file.close()
        if isinstance(error, _DAMAGE):
            raise FileNotFoundError(self._path) from error

    @property
    def now(self) -> int:
        """The version trained at."""
        return int(self._file["now"])

    def causes(self) -> list[str]:
        """Causes by bit."""
        return [str(cause) for cause in self._file["causes"]] if "causes" in self._file.files else []

    def rows(self) -> Iterator[tuple[int, int]]:
        """Yield micro-batch and row of each trajectory."""
        for part in range(sum(name.startswith("tokens_") for name in self._file.files)):
            for at in range(len(self.column("lengths", part))):
                yield part, at

    def column(self, name: str, part: int) -> Any:
        """Return an array of a micro-batch; None if the file has no such array."""
        key = f"{name}_{part}"
        if key not in self._file.files:
            return None
        if key not in self._read:
            self._read[key] = self._file[key]
        return self._read[key]


def _numbers(values: NDArray[Any], known: NDArray[Any] | None = None) -> list[float | None]:
    finite = np.isfinite(values) if known is None else np.isfinite(values) & known
    return [float(f"{value:.{DIGITS}g}") if good else None for value, good in zip(values, finite, strict=True)]
