"""The shards of a checkpoint: written and read by all ranks with torch.distributed.checkpoint.

    checkpoints/00000012-00000003/shards/   the files of torch.distributed.checkpoint

Each rank writes masters and moments of its own shards. The manifest names the digest of every file, and it is committed
after all ranks have written and hashed theirs. Any number of ranks can read them.
"""

import shutil
from functools import partial
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_saver import save

from palimpsest.common import failpoints
from palimpsest.common.files import sync_folder
from palimpsest.services.learner.checkpointing.manifest import SHARDS, file_digest
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy
from palimpsest.services.learner.sharding.shared_work import OnAllRanks, Shards

METADATA = ".metadata"


class ShardFiles:
    """Rank 0's side. See checkpointing/checkpoints.py."""

    def __init__(self, on_all_ranks: OnAllRanks, policy: ShardedPolicy) -> None:
        self._on_all_ranks, self._policy = on_all_ranks, policy

    def write(self, folder: Path) -> dict[str, str]:
        """Write the shards of all ranks to a folder of a checkpoint. Return file name -> digest."""
        return self._on_all_ranks(partial(write_shards, folder=folder / SHARDS))

    def found(self, folder: Path) -> None:
        """Let all ranks continue from the shards of this checkpoint. They read them in `broadcast_state`."""
        self._policy.source = folder / SHARDS


@torch.no_grad()
def write_shards(shards: Shards, folder: Path) -> dict[str, str]:
    """Write this rank's shards. Return file name -> digest of the files of all ranks."""
    ranks, policy = shards.ranks, shards.split_policy
    assert policy is not None
    if ranks.is_rank0:
        shutil.rmtree(folder, ignore_errors=True)  # left by an attempt that did not finish
        folder.mkdir(parents=True)
    ranks.all_gather_object("made")
    failpoints.reach("learner.before_shards")
    save(policy.shards(), checkpoint_id=folder)
    failpoints.reach("learner.after_shards")
    own = sorted(file.name for file in folder.glob(f"__{ranks.rank}_*"))
    digests = {name: file_digest(folder / name) for name in own}
    if ranks.is_rank0:
        digests[METADATA] = file_digest(folder / METADATA)
        sync_folder(folder)
    return {name: digest for part in ranks.all_gather_object(digests) for name, digest in part.items()}
