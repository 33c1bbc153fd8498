"""Averages of weights on ranks that share rows, and on the same ranks with whole rows (context_on_ranks.py)."""

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import pad
from palimpsest.services.learner.distributed import Context, ProcessGroup
from palimpsest.services.learner.model.policy import score_batch
from palimpsest.services.learner.sharding.load import ModelFiles
from palimpsest.services.learner.sharding.local_shards import local_rows
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy
from tests.learner_parts.models import CPU
from tests.processes.averages_on_ranks import KINDS, SHARES, built, results
from tests.processes.shard_on_ranks import OPTIMIZER
from tests.processes.sharded_versions import Versions, a_rank, whole_version
from tests.processes.train_on_ranks import some_rows

AVERAGED = tuple(KINDS)
STEP = 0.1
"""Size of the change of a version, relative to the weights: the newest version has other log-probs than the average."""


def averages(kind: str, model: str, mesh: DeviceMesh, ranks: ProcessGroup) -> dict[str, Any]:
    """Results of three versions, on "shared" rows and on rows that each rank has "alone"."""
    return {
        name: averaged(kind, model, mesh, ranks, context)
        for name, context in (("alone", None), ("shared", ranks.context))
    }


@torch.no_grad()
def averaged(kind: str, model: str, mesh: DeviceMesh, ranks: ProcessGroup, context: Context | None) -> dict[str, Any]:
    """Results after three versions. The means are this rank's shards."""
    files = ModelFiles(model, "sdpa", mesh, ranks.device, layout="packed", context=context)
    policy = ShardedPolicy(files.build(holds=torch.float32, trains=True), OPTIMIZER, ranks)
    shards, store = a_rank(policy, files, ranks), Versions()
    state = built(kind, policy, store, ranks, shards)
    store.add(Version(0), whole_version(shards))
    for version, share in enumerate(SHARES, start=1):
        for place, (parameter, own) in enumerate(zip(policy.parameters, policy.masters, strict=True)):
            generator = torch.Generator().manual_seed(100 * version + place)
            start, stop = local_rows(parameter)
            own.mul_(1 + STEP * torch.randn(parameter.shape, generator=generator)[start:stop])
        assert state.stateful_source is not None
        state.stateful_source.published(
            policy.masters, active_share=share, mean_staleness=1.0, unmasked_share=share, version=Version(version)
        )
        store.add(Version(version), whole_version(shards))
    source: Any = state.source
    found = results(state, policy, [mean.clone() for mean in source.average.means])
    return found | {"newest": score_batch(policy.model, pad(some_rows("m", [20, 12])), CPU)}
