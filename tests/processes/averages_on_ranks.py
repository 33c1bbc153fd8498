"""Average the weights of a policy that is split over the ranks, as the replicated learner does, and save both.

torchrun --standalone --nproc-per-node=N -m tests.processes.averages_on_ranks MODEL FOLDER write|read
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from palimpsest.common.config.proximal import EwmaProximal, PpoEwmaAsyncProximal
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import pad
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.proximal.surrogates.ewma_prox import EwmaProx
from palimpsest.services.learner.proximal.surrogates.ppo_ewma_async import PpoEwmaAsync
from palimpsest.services.learner.sharding.load import COMPUTES, ModelFiles
from palimpsest.services.learner.sharding.local_shards import local_rows
from palimpsest.services.learner.sharding.shard_files import write_shards
from palimpsest.services.learner.sharding.sharded_model import like
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy
from palimpsest.services.learner.sharding.shared_work import Shards
from palimpsest.services.learner.training.build import build_training_state
from palimpsest.services.learner.training.state import TrainingState
from tests.learner_parts.models import CPU, load
from tests.processes.shard_on_ranks import OPTIMIZER
from tests.processes.sharded_versions import Versions, a_rank, whole_version
from tests.processes.train_on_ranks import some_rows
from tests.records.builders import a_learner

KINDS = {
    "ewma_prox": a_learner(proximal=EwmaProximal(kind="ewma_prox", decay=0.7)),
    "ppo_ewma_async": a_learner(proximal=PpoEwmaAsyncProximal(kind="ppo_ewma_async", window=3, reset="off")),
    "a guarded reset": a_learner(
        proximal=PpoEwmaAsyncProximal(kind="ppo_ewma_async", window=3, reset="guarded", patience=1, cooldown=1)
    ),
}
SHARES = (0.9, 0.9, 0.1)
"""Active share of each version: the last one is low, so a guarded rule resets."""


def noise(master: torch.Tensor, version: int, place: int) -> torch.Tensor:
    """What one version adds to a whole weight."""
    return 1e-3 * torch.randn(master.shape, generator=torch.Generator().manual_seed(100 * version + place))


def built(kind: str, policy: Any, store: Versions, ranks: ProcessGroup, shards: Shards | None) -> TrainingState:
    """The training state of a rank."""
    arguments: dict[str, Any] = {"on_load": lambda _: None, "ranks": ranks, "shards": shards}
    return build_training_state(KINDS[kind], policy, store, CPU, **arguments)  # type: ignore[arg-type]


def results(state: TrainingState, policy: Any, means: list[torch.Tensor]) -> dict[str, Any]:
    """Values that must be equal with and without shards."""
    source = state.source
    assert isinstance(source, EwmaProx | PpoEwmaAsync)
    batches = [pad(some_rows("m", [20, 12])), pad(some_rows("n", [9]))]
    return {
        "means": means,
        "scores": source.proximal(batches, Version(3)).logprobs,
        "gauges": {name: value for name, value in state.gauges(policy.masters).items() if name.startswith("ewma")},
    }


def main(model: str, folder: Path, *, writes: bool) -> None:
    """write: average three versions, then write a checkpoint. read: continue from it. Save one file per kind and
    rank."""
    torch.set_num_threads(1)
    ranks = ProcessGroup(equal_passes=True)
    files = ModelFiles(model, "eager", init_device_mesh("cpu", (ranks.size,)), ranks.device)
    for number, kind in enumerate(KINDS):
        sharded = ShardedPolicy(files.build(holds=torch.float32, trains=True), OPTIMIZER, ranks)
        shards, store = a_rank(sharded, files, ranks), Versions()
        state = built(kind, sharded, store, ranks, shards)
        place = folder / f"checkpoint {number}"
        saved: dict[str, Any] = {}
        if writes:
            saved["replicated"] = averaged(kind, model, sharded, state, shards, store)
            write_shards(shards, place)
            if ranks.is_rank0:
                torch.save(state.state(), folder / f"state {number}.pt")
        else:
            state.restore(torch.load(folder / f"state {number}.pt"))
            sharded.source, sharded.steps = place, 0
            sharded.share(ranks)
        average: Any = state.source
        means = [like(*both).full_tensor() for both in zip(sharded.parameters, average.average.means, strict=True)]
        saved["sharded"] = results(state, sharded, means)
        saved["bytes"] = sum(4 * mean.numel() for mean in average.average.means)
        torch.save(saved, folder / f"{kind} {'write' if writes else 'read'} {ranks.rank}.pt")
    ranks.close()


def averaged(
    kind: str, model: str, sharded: ShardedPolicy, state: TrainingState, shards: Shards, store: Versions
) -> dict[str, Any]:
    """Publish three versions to both averages; return the results of the replicated one."""
    alone = TrainablePolicy(load(Path(model)), OPTIMIZER)
    whole = built(kind, alone, store, shards.ranks, None)
    store.add(Version(0), whole_version(shards))
    for version, share in enumerate(SHARES, start=1):
        for i, (parameter, own, master) in enumerate(
            zip(sharded.parameters, sharded.masters, alone.masters, strict=True)
        ):
            master += noise(master, version, i)
            start, stop = local_rows(parameter)
            own.copy_(master[start:stop] if master.ndim else master)
        for policy, each in ((sharded, state), (alone, whole)):
            source = each.stateful_source
            assert source is not None
            source.published(
                policy.masters, active_share=share, mean_staleness=1.0, unmasked_share=share, version=Version(version)
            )
        store.add(Version(version), whole_version(shards))
    average: Any = whole.source
    assert all(parameter.dtype == COMPUTES for parameter in alone.model.parameters())
    return results(whole, alone, [mean.clone() for mean in average.average.means])


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1], Path(sys.argv[2]), writes=sys.argv[3] == "write")
