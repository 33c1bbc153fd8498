"""Restartable state of the learner: whole or not there.

    checkpoints/00000012-00000003/state.safetensors   masters and moments, float32
    checkpoints/00000012-00000003/manifest.json       written last: without it the folder does not count

The manifest holds the digest of the state, the ledger, and the offsets from which the log is read again. So a
checkpoint is a consistent cut: what the weights have learnt from, and nothing else, is counted as trained in it.
"""

import shutil
from pathlib import Path

import msgspec
import torch
from blake3 import blake3
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from common import faults
from common.files import sync_folder, write
from common.logs import logger
from common.versions import Version
from services.learner.progress import MANIFEST, SCHEMA, STATE, Progress, complete, folder_name, read_progress


class NoCheckpoint(LookupError):
    """There is none to start from."""


class Checkpoints:
    """The newest few, in one folder."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder, self._keep = folder, keep

    def save(self, progress: Progress, tensors: dict[str, torch.Tensor]) -> None:
        """Write one and remove those beyond the number to keep.

        One that already stands for this version is left alone: what the ledger has learnt since is on the log and
        will be read again.
        """
        folder = self._folder / folder_name(progress.version, progress.writer)
        if (folder / MANIFEST).exists():
            return
        body = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        sealed = msgspec.structs.replace(progress, state_digest=blake3(body).hexdigest())
        if folder.exists():
            shutil.rmtree(folder)  # of an attempt that was not finished
        write(folder / STATE, body)
        faults.reach("learner.inside_checkpoint")
        write(folder / MANIFEST, msgspec.json.encode(sealed))
        sync_folder(self._folder)
        for old in complete(self._folder)[: -self._keep]:
            (old / MANIFEST).unlink()  # first: a folder half removed must not count
            shutil.rmtree(old)

    def newest(self) -> tuple[Progress, dict[str, torch.Tensor]]:
        """The newest one that holds. Raises NoCheckpoint.

        A damaged one is passed over, loudly: the one before it is a consistent state too, and the log still holds what
        came in between.
        """
        for folder in reversed(complete(self._folder)):
            try:
                progress = read_progress(folder)
                body = (folder / STATE).read_bytes()
            except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
                logger().error("checkpoint passed over", folder=str(folder), reason=str(error))
                continue
            if progress.schema != SCHEMA or blake3(body).hexdigest() != progress.state_digest:
                logger().error("checkpoint passed over", folder=str(folder), reason="its digest does not hold")
                continue
            return progress, load_tensors(body)
        raise NoCheckpoint(str(self._folder))

    def oldest_version(self) -> Version | None:
        """Version of the oldest one kept."""
        oldest = next(iter(complete(self._folder)), None)
        return read_progress(oldest).version if oldest else None
