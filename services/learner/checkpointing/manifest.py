"""What a checkpoint says besides its tensors, and where it stands. Read without torch.

    checkpoints/00000012-00000003/state.safetensors   of version 12, by writer 3: masters and moments, float32
    checkpoints/00000012-00000003/manifest.json       named so last: without it the folder does not count

Until the snapshot store has taken the checkpoint, the manifest is called proposed.json (checkpoint.py).

Later checkpoints have later names: versions do not go back from one writer to the next.
"""

import re
from pathlib import Path

import msgspec
from msgspec import Struct, field

from palimpsest.common.versions import Version
from palimpsest.services.learner.buffer.ledger import LedgerState

SCHEMA = 1
STATE, MANIFEST, PROPOSED = "state.safetensors", "manifest.json", "proposed.json"
_NAME = re.compile(r"(\d{8,})-(\d{8,})")


class Progress(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything of a checkpoint but the tensors."""

    schema: int
    run: str
    writer: int
    """Epoch of the learner that wrote it."""
    version: Version
    digest: str
    """Of the weights published, or about to be, under that version."""
    trained_versions: int
    optimizer_steps: int
    ledger: LedgerState
    offsets: dict[int, int]
    """Topic `trajectories`: where reading starts again."""
    task_offsets: dict[int, int]
    """Topic `tasks`: where the groups the ledger knows end."""
    history_bytes: int
    """Length of history.jsonl."""
    seconds: float
    """Of running, over all processes that took part."""
    state_digest: str = ""
    """blake3 of state.safetensors, hex."""
    score_offsets: dict[int, int] = field(default_factory=dict)
    """Topic `old_logprobs`: what stands before is of trajectories the ledger has settled. {}, as checkpoints of earlier
    releases have it: it may be anyone's."""


def folder_name(version: Version, writer: int) -> str:
    """The checkpoint's folder in `checkpoints/`.

    >>> folder_name(Version(12), 3)
    '00000012-00000003'
    """
    return f"{version:08d}-{writer:08d}"


def version_and_writer(name: str) -> tuple[Version, int] | None:
    """What a folder's name says; None if it is no checkpoint's.

    >>> version_and_writer("00000012-00000003")
    (12, 3)
    """
    match = _NAME.fullmatch(name)
    return (Version(int(match[1])), int(match[2])) if match else None


def complete(checkpoints: Path) -> list[Path]:
    """The folders of the checkpoints that count, oldest first; after them any that this release does not name so."""
    folders = [manifest.parent for manifest in checkpoints.glob(f"*/{MANIFEST}")]
    ours = {folder: place for folder in folders if (place := version_and_writer(folder.name))}
    return sorted(ours, key=ours.__getitem__) + sorted(set(folders) - ours.keys())


def read_progress(folder: Path) -> Progress:
    """What the checkpoint in this folder says. Raises OSError, msgspec.DecodeError, UnicodeDecodeError."""
    return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Progress)
