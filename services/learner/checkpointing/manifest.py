"""What a checkpoint holds beside its tensors, and where it is stored. Read without torch.

    checkpoints/00000012-00000003/state.safetensors   of version 12, by writer 3: masters and moments, float32
    checkpoints/00000012-00000003/manifest.json       renamed last: without it the folder does not count

Until the snapshot store has taken the checkpoint, the manifest is called proposed.json (checkpoints.py).

Names sort by age: versions do not decrease from one writer to the next.
"""

import re
from pathlib import Path

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
    """Topic `trajectories`: where a restart reads from."""
    task_offsets: dict[int, int]
    """Topic `tasks`: where the tasks of the groups in the ledger end."""
    history_bytes: int
    """Length of history.jsonl."""
    seconds: float
    """Run time, over all processes of the run."""
    state_digest: str = ""
    """blake3 of state.safetensors, hex."""
    score_offsets: dict[int, int] = field(default_factory=dict)
    """Topic `old_logprobs`: records before these offsets belong to resolved trajectories. {}, as in checkpoints of
    earlier releases: any record may count."""


def folder_name(version: Version, writer: int) -> str:
    """The checkpoint's folder in `checkpoints/`.

    >>> folder_name(Version(12), 3)
    '00000012-00000003'
    """
    return f"{version:08d}-{writer:08d}"


def version_and_writer(name: str) -> tuple[Version, int] | None:
    """Version and writer in a folder's name; None if the folder is no checkpoint.

    >>> version_and_writer("00000012-00000003")
    (12, 3)
    """
    match = _NAME.fullmatch(name)
    return (Version(int(match[1])), int(match[2])) if match else None


def complete(checkpoints: Path) -> list[Path]:
    """The folders of the checkpoints that count, oldest first, followed by folders with names of other releases."""
    folders = [manifest.parent for manifest in checkpoints.glob(f"*/{MANIFEST}")]
    ours = {folder: place for folder in folders if (place := version_and_writer(folder.name))}
    return sorted(ours, key=ours.__getitem__) + sorted(set(folders) - ours.keys())
