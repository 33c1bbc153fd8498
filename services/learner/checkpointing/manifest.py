"""The manifest of a checkpoint, and the names of its files. Needs no torch.

    checkpoints/00000012-00000003/state.safetensors   of version 12, by writer 3: masters and moments, float32
    checkpoints/00000012-00000003/shards/             of a sharded policy: masters and moments of all ranks
    checkpoints/00000012-00000003/manifest.json       renamed last: a folder without it is not a checkpoint

Until the snapshot store has committed the checkpoint, the manifest is called proposed.json (checkpoints.py).

Names sort by age, because versions do not decrease from one writer to the next.
"""

import re
from pathlib import Path

from blake3 import blake3
from msgspec import Struct, field

from palimpsest.common.snapshots.adapter import Adapter
from palimpsest.common.versions import Version
from palimpsest.services.learner.buffer.ledger import LedgerState
from palimpsest.services.learner.control.state import ControlState
from palimpsest.services.learner.evaluation.state import EvaluationState

SCHEMA = 1
SHARDS = "shards"
"""Folder in a checkpoint's: the shards of a sharded policy."""
STATE, MANIFEST, PROPOSED = "state.safetensors", "manifest.json", "proposed.json"
_NAME = re.compile(r"(\d{8,})-(\d{8,})")


class Progress(Struct, frozen=True, forbid_unknown_fields=True):
    """All values of a checkpoint except the tensors."""

    schema: int
    run: str
    writer: int
    """Epoch of the learner that wrote it."""
    version: Version
    digest: str
    """Digest of the weights that were published or will be published under `version`."""
    trained_versions: int
    optimizer_steps: int
    ledger: LedgerState
    offsets: dict[int, int]
    """Topic `trajectories`: partition -> offset at which a restart starts reading."""
    task_offsets: dict[int, int]
    """Topic `tasks`: partition -> offset after the last task of the groups in the ledger."""
    history_bytes: int
    """Length of history.jsonl."""
    seconds: float
    """Run time in seconds, summed over all learner processes of the run."""
    state_digest: str = ""
    """blake3 of state.safetensors, hex."""
    score_offsets: dict[int, int] = field(default_factory=dict)
    """Topic `old_logprobs`: records before these offsets belong to resolved trajectories. {} (the value in checkpoints
    of earlier releases): any record may belong to an unresolved one."""
    shards: dict[str, str] = field(default_factory=dict)
    """File in the folder of the shards -> its blake3, hex. {} without sharding: state.safetensors has the policy."""
    control: ControlState = ControlState()
    """What people changed in the run."""
    evaluation: EvaluationState = EvaluationState()
    """The evaluations; none in checkpoints of earlier releases."""
    adapter: Adapter | None = None
    """What is trained, if it is an adapter; None if all weights are."""


def file_digest(file: Path) -> str:
    """Return blake3 of a file's bytes, hex, computed on all cores. Raises OSError."""
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(file)
    return hasher.hexdigest()


def folder_name(version: Version, writer: int) -> str:
    """Return the name of the checkpoint's folder in `checkpoints/`.

    >>> folder_name(Version(12), 3)
    '00000012-00000003'
    """
    return f"{version:08d}-{writer:08d}"


def version_and_writer(name: str) -> tuple[Version, int] | None:
    """Return the version and writer in a folder's name; None if it is not the name of a checkpoint.

    >>> version_and_writer("00000012-00000003")
    (12, 3)
    """
    match = _NAME.fullmatch(name)
    return (Version(int(match[1])), int(match[2])) if match else None


def complete(checkpoints: Path) -> list[Path]:
    """Return the folders of committed checkpoints, oldest first, followed by folders with names of other releases."""
    folders = [manifest.parent for manifest in checkpoints.glob(f"*/{MANIFEST}")]
    ours = {folder: place for folder in folders if (place := version_and_writer(folder.name))}
    return sorted(ours, key=ours.__getitem__) + sorted(set(folders) - ours.keys())
