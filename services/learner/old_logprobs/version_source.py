"""Where the learner's ranks and the replicas read versions: files that processes of a machine share, or the store.

In the folder of shared files (common/snapshots/shared_objects.py), each object is transferred once for a machine.
"""

import os

from palimpsest.common import run_folder
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.shared_objects import SharedObjects
from palimpsest.common.snapshots.walker import VersionSource
from palimpsest.services.learner.distributed import ProcessGroup


def source_of_rank(config: RunConfig, store: SnapshotClient, ranks: ProcessGroup) -> VersionSource:
    """Return the source of a rank of the learner.

    Several ranks of a node share files, with the workers of its machine if the learner has no other node. The nodes of
    a learner may have one `run.folder`, so each has a folder of its own in it: a file that a process of another machine
    removes may not be readable to its end. A single rank of a node reads the store: beside workers it would save one of
    two transfers, but alone it would write and sync files that no other process reads.
    """
    of_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if min(of_node, ranks.size) == 1:
        return store
    node = "" if of_node == ranks.size else os.environ.get("GROUP_RANK", "0")
    return SharedObjects(store, run_folder.objects_folder(config.run.home, node))


def source_of_replica(config: RunConfig, store: SnapshotClient) -> VersionSource:
    """Return the source of a replica: the files of workers or ranks of its machine, where there are any.

    They have read a version before they make a trajectory that needs it. A replica that is alone, as in a pod, finds no
    folder and reads the store.
    """
    return SharedObjects(store, run_folder.objects_folder(config.run.home), begins=False)
