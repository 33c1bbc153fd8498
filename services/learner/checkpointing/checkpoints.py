"""Restartable state of the learner: it counts whole, or not at all, and only what the newest learner wrote.

A checkpoint is written beside its place (progress.py), proposed to the snapshot store with its manifest's digest, and
counts from the moment the store takes it; then the manifest gets its name. The store takes nothing of a learner that
was replaced. Each learner writes into folders of its own, so that one that was paused cannot spoil its successor's.

The manifest holds the digest of the state, the ledger, and the offsets from which the log is read again. So a
checkpoint is a consistent cut: what the weights have learned from, and nothing else, is counted as trained in it.
"""

import shutil
from pathlib import Path

import msgspec
import torch
from blake3 import blake3
from safetensors.torch import load as load_tensors, save as save_tensors

from palimpsest.common import failpoints
from palimpsest.common.files import sync_folder, write
from palimpsest.common.logs import logger
from palimpsest.common.snapshots.writer import Committed, Writer
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.checkpointing.manifest import (
    MANIFEST,
    PROPOSED,
    SCHEMA,
    STATE,
    Progress,
    complete,
    folder_name,
    version_and_writer,
)


class NoCheckpoint(LookupError):
    """There is none to start from."""


class Checkpoints:
    """The newest few, in one folder. `newest` comes first."""

    def __init__(self, folder: Path, writer: Writer, *, keep: int) -> None:
        self._folder, self._writer, self._keep = folder, writer, keep
        self._committed: list[Committed] = []
        """Those that count, oldest first; as the newest writer this learner alone changes them."""

    def newest(self) -> tuple[Progress, dict[str, torch.Tensor]]:
        """The newest one that holds. Raises NoCheckpoint; UserError when folder and store contradict each other.

        A damaged one is passed over, loudly: the one before it is a consistent state too, and the log still holds what
        came in between.
        """
        self._committed = self._writer.committed()
        self._refuse_what_the_store_has_lost()
        for commit in reversed(self._committed):
            folder = self._place(commit)
            try:
                return _read(folder, commit)
            except (OSError, ValueError, msgspec.DecodeError) as error:
                logger().error("checkpoint passed over", folder=str(folder), reason=str(error))
        if self._committed:
            raise UserError(
                f"none of this run's {len(self._committed)} checkpoints can be read in {self._folder} (the log says "
                f"why): restore that folder from a copy, or start a new run; beginning again would train twice",
                ExitCode.DAMAGED,
            )
        raise NoCheckpoint(str(self._folder))

    def save(self, progress: Progress, tensors: dict[str, torch.Tensor]) -> None:
        """Write one and remove those beyond the number to keep. Raises Fenced.

        One that this learner wrote for this version is left alone: what the ledger has learned since is on the log and
        will be read again.
        """
        if any((c.version, c.writer) == (progress.version, self._writer.epoch) for c in self._committed):
            return
        try:
            self._save(progress, tensors)
        except FileNotFoundError:
            self._writer.confirm()  # a successor removes what we had not committed
            raise

    def oldest_version(self) -> Version | None:
        """Version of the oldest one kept."""
        return self._committed[0].version if self._committed else None

    def _save(self, progress: Progress, tensors: dict[str, torch.Tensor]) -> None:
        folder = self._folder / folder_name(progress.version, progress.writer)
        body = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        manifest = msgspec.json.encode(msgspec.structs.replace(progress, state_digest=blake3(body).hexdigest()))
        if folder.exists():
            shutil.rmtree(folder)  # of an attempt that was not finished
        write(folder / STATE, body)
        failpoints.reach("learner.inside_checkpoint")
        write(folder / PROPOSED, manifest)
        sync_folder(self._folder)
        failpoints.reach("learner.before_committing")
        self._committed.append(self._writer.commit(progress.version, blake3(manifest).hexdigest()))
        failpoints.reach("learner.after_committing")
        _settle(folder)
        self._remove_old()

    def _remove_old(self) -> None:
        """The store first: from then on a folder does not count, and one half removed must not."""
        while len(self._committed) > self._keep:
            self._writer.withdraw(self._committed[0])
            del self._committed[0]
        kept = {(commit.version, commit.writer) for commit in self._committed}
        for folder in self._folder.iterdir():
            place = version_and_writer(folder.name)
            if place is not None and place not in kept and place[1] <= self._writer.epoch:  # not a successor's
                (folder / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(folder)

    def _refuse_what_the_store_has_lost(self) -> None:
        """A folder counts only after the store took it, and ceases to before newer ones do: a newer one was lost."""
        newest = max(((commit.version, commit.writer) for commit in self._committed), default=(Version(-1), 0))
        places = [(folder, version_and_writer(folder.name)) for folder in complete(self._folder)]
        if lost := [folder for folder, place in places if place is None or place > newest]:
            raise UserError(
                f"{self._folder} holds checkpoint {lost[-1].name}, which the snapshot store does not know: the store "
                f"was emptied, put back from an older copy, or is another run's. Restore it, or start a new run with "
                f"another --run.id",
                ExitCode.DAMAGED,
            )

    def _place(self, commit: Committed) -> Path:
        return self._folder / folder_name(commit.version, commit.writer)


def _read(folder: Path, commit: Committed) -> tuple[Progress, dict[str, torch.Tensor]]:
    """Raises OSError, ValueError, DecodeError unless it is whole and the one committed."""
    if not (folder / MANIFEST).exists():
        _settle(folder)  # its learner died, or was replaced, just after the store had taken it
    manifest = (folder / MANIFEST).read_bytes()
    if blake3(manifest).hexdigest() != commit.digest:
        raise ValueError("its manifest is not the one that the store took")
    progress = msgspec.json.decode(manifest, type=Progress)
    if progress.schema != SCHEMA:
        raise ValueError(f"its schema is {progress.schema}, this release writes {SCHEMA}")
    body = (folder / STATE).read_bytes()
    if blake3(body).hexdigest() != progress.state_digest:
        raise ValueError("its state contradicts its digest")
    return progress, load_tensors(body)


def _settle(folder: Path) -> None:
    """Give the manifest its name: whoever looks without asking the store sees that it counts."""
    (folder / PROPOSED).rename(folder / MANIFEST)
    sync_folder(folder)
