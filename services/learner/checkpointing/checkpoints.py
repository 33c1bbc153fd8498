"""Checkpoints of the learner. A checkpoint is valid if it is complete and the snapshot store has committed it.

The learner writes the state and the manifest as proposed.json (manifest.py), then commits the manifest's digest to the
snapshot store. The checkpoint is valid from that moment; the manifest is renamed afterwards. The store refuses commits
of a learner that was replaced. Folder names hold the writer's epoch, so that a paused learner cannot overwrite a
checkpoint of its successor.

The manifest holds the digest of the state, the ledger, and the offsets at which a restart reads the log. So a
checkpoint is consistent: it counts a trajectory as trained exactly if the weights were trained on it.
"""

import shutil
from pathlib import Path
from typing import Protocol

import msgspec
import torch
from blake3 import blake3
from safetensors.torch import load as load_tensors, save as save_tensors

from palimpsest.common import failpoints
from palimpsest.common.files import sync_folder, write
from palimpsest.common.logs import logger
from palimpsest.common.snapshots.adapter import Adapter, refuse_other_adapter
from palimpsest.common.snapshots.writer import Committed, Writer
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.checkpointing.manifest import (
    MANIFEST,
    PROPOSED,
    SCHEMA,
    SHARDS,
    STATE,
    Progress,
    complete,
    file_digest,
    folder_name,
    version_and_writer,
)


class ShardWriter(Protocol):
    """Writes and reads the shards of a sharded policy, with all ranks.

    Only the thread of the loop may call it: it gives orders to the other ranks.
    """

    def write(self, folder: Path) -> dict[str, str]:
        """Write them to the folder of a checkpoint. Return file -> blake3, hex."""

    def found(self, folder: Path) -> None:
        """Called with the folder of the checkpoint from which the run continues."""


class NoCheckpoint(LookupError):
    """The run has no committed checkpoint."""


class Checkpoints:
    """The newest `keep` checkpoints, in one folder. Call `newest` first."""

    def __init__(
        self,
        folder: Path,
        writer: Writer,
        *,
        keep: int,
        shards: ShardWriter | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        """shards: writes those of a sharded policy; None if it is not sharded. adapter: what is trained; None: all
        weights."""
        self._folder, self._writer, self._keep, self._shards = folder, writer, keep, shards
        self._adapter = adapter
        self._committed: list[Committed] = []
        """Committed checkpoints, oldest first. Only this learner changes them, because it is the newest writer."""

    def newest(self) -> tuple[Progress, dict[str, torch.Tensor]]:
        """Return the newest checkpoint that can be read.

        A damaged checkpoint is skipped and logged: the one before it is a consistent state too, and the log still holds
        the later records. Raises NoCheckpoint if none was committed, UserError if no committed checkpoint can be read
        or the store lost one.
        """
        self._committed = self._writer.committed()
        self._check_store_is_complete()
        for commit in reversed(self._committed):
            folder = self._folder_of(commit)
            try:
                progress, tensors = _read(folder, commit)
            except (OSError, ValueError, msgspec.DecodeError) as error:
                logger().error("checkpoint skipped", folder=str(folder), reason=str(error))
            else:
                self._continue_from(folder, progress)
                return progress, tensors
        if self._committed:
            raise UserError(
                f"none of this run's {len(self._committed)} checkpoints can be read; the log holds the reasons. "
                f"Restore {self._folder} from a copy, or start a new run with another --run.id",
                ExitCode.DAMAGED,
            )
        raise NoCheckpoint(str(self._folder))

    def _continue_from(self, folder: Path, progress: Progress) -> None:
        """Tell the writer of shards. Raises UserError if the checkpoint has shards and the policy has none, or if it is
        of another adapter or base model."""
        refuse_other_adapter(progress.adapter, self._adapter, f"checkpoint {folder.name} of this run")
        if self._shards is not None:
            if progress.shards:
                self._shards.found(folder)
        elif progress.shards:
            raise UserError(
                f"checkpoint {folder.name} of this run was written with sharding: continue the run with "
                f'learner.sharding = "full"'
            )

    def keep(self, number: int) -> None:
        """Keep this number of checkpoints from the next one on."""
        self._keep = number

    def save(self, progress: Progress, tensors: dict[str, torch.Tensor]) -> bool:
        """Write a checkpoint and remove the oldest ones beyond `keep`. Return whether it was written. Raises Fenced.

        Does nothing if this learner has already written a checkpoint of this version: a restart reads later changes of
        the ledger from the log.
        """
        if any((c.version, c.writer) == (progress.version, self._writer.epoch) for c in self._committed):
            return False
        try:
            self._save(progress, tensors)
        except FileNotFoundError:
            self._writer.confirm()  # a successor removes uncommitted folders; then this raises Fenced
            raise
        return True

    def oldest_version(self) -> Version | None:
        """Version of the oldest checkpoint that is kept; None without any."""
        return self._committed[0].version if self._committed else None

    def _save(self, progress: Progress, tensors: dict[str, torch.Tensor]) -> None:
        folder = self._folder / folder_name(progress.version, progress.writer)
        body = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        if folder.exists():
            shutil.rmtree(folder)  # left by an attempt that did not finish
        shards = {} if self._shards is None else self._shards.write(folder)
        manifest = msgspec.json.encode(
            msgspec.structs.replace(
                progress, state_digest=blake3(body).hexdigest(), shards=shards, adapter=self._adapter
            )
        )
        write(folder / STATE, body)
        failpoints.reach("learner.inside_checkpoint")
        write(folder / PROPOSED, manifest)
        sync_folder(self._folder)
        failpoints.reach("learner.before_committing")
        self._committed.append(self._writer.commit(progress.version, blake3(manifest).hexdigest()))
        failpoints.reach("learner.after_committing")
        _rename_manifest(folder)
        self._remove_old()

    def _remove_old(self) -> None:
        """Withdraw each checkpoint from the store before its folder is removed: a partly removed folder must not be
        valid."""
        while len(self._committed) > self._keep:
            self._writer.withdraw(self._committed[0])
            del self._committed[0]
        kept = {(commit.version, commit.writer) for commit in self._committed}
        for folder in self._folder.iterdir():
            place = version_and_writer(folder.name)
            if place is not None and place not in kept and place[1] <= self._writer.epoch:  # keep a successor's folders
                (folder / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(folder)

    def _check_store_is_complete(self) -> None:
        """Raise UserError if a folder is newer than every commit in the store.

        A folder gets its manifest after the commit, and commits are withdrawn oldest first. So such a folder shows that
        the store lost a commit.
        """
        newest = max(((commit.version, commit.writer) for commit in self._committed), default=(Version(-1), 0))
        places = [(folder, version_and_writer(folder.name)) for folder in complete(self._folder)]
        if lost := [folder for folder, place in places if place is None or place > newest]:
            raise UserError(
                f"{self._folder} holds checkpoint {lost[-1].name}, but the snapshot store has no commit of it: the "
                f"store was emptied, restored from an older copy, or belongs to another run. Restore the store, or "
                f"start a new run with another --run.id",
                ExitCode.DAMAGED,
            )

    def _folder_of(self, commit: Committed) -> Path:
        return self._folder / folder_name(commit.version, commit.writer)


def _read(folder: Path, commit: Committed) -> tuple[Progress, dict[str, torch.Tensor]]:
    """Read a committed checkpoint. Raises OSError, ValueError or DecodeError if it is incomplete or another one."""
    if not (folder / MANIFEST).exists():
        _rename_manifest(folder)  # its learner died or was replaced between the commit and the rename
    manifest = (folder / MANIFEST).read_bytes()
    if blake3(manifest).hexdigest() != commit.digest:
        raise ValueError("the digest of manifest.json differs from the committed digest")
    progress = msgspec.json.decode(manifest, type=Progress)
    if progress.schema != SCHEMA:
        raise ValueError(f"the schema is {progress.schema}; this release reads {SCHEMA}")
    body = (folder / STATE).read_bytes()
    if blake3(body).hexdigest() != progress.state_digest:
        raise ValueError("the digest of state.safetensors differs from the digest in manifest.json")
    for name, digest in progress.shards.items():
        if file_digest(folder / SHARDS / name) != digest:
            raise ValueError(f"the digest of {SHARDS}/{name} differs from the digest in manifest.json")
    return progress, load_tensors(body)


def _rename_manifest(folder: Path) -> None:
    """Rename proposed.json to manifest.json, so that programs without the store see that the checkpoint is valid."""
    (folder / PROPOSED).rename(folder / MANIFEST)
    sync_folder(folder)
