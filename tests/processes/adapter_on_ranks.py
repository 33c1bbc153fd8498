"""Train an adapter under torchrun, on whole weights and on weights that are split over the ranks, and save both.

torchrun --standalone --nproc-per-node=2 -m tests.processes.adapter_on_ranks MODEL DEEP EXPERTS FOLDER
"""

import copy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.common.snapshots.client import VersionMissing
from palimpsest.common.user_error import UserError
from palimpsest.common.versions import Version
from palimpsest.services.learner.batch.batching import Row, pad
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.lora import add_adapter, copy_trained
from palimpsest.services.learner.model.policy import checkpoint_activations, load_model, score_batch
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.model.weights import named_weights, raw_tensors
from palimpsest.services.learner.old_logprobs.versioned_model import VersionedModel
from palimpsest.services.learner.proximal.surrogates.ewma_prox import EwmaProx
from palimpsest.services.learner.publishing.canaries import Canaries
from palimpsest.services.learner.sharding.adapter_policy import AdapterPolicy
from palimpsest.services.learner.sharding.load import COMPUTES, ModelFiles
from palimpsest.services.learner.sharding.published_weights import score_canaries
from palimpsest.services.learner.sharding.shared_work import Shards
from palimpsest.services.learner.sharding.version_part import VersionPart
from palimpsest.services.learner.sharding.versioned_adapter import VersionedAdapter
from palimpsest.services.learner.training.build import build_training_state
from palimpsest.services.learner.training.follower import broadcast_state
from palimpsest.services.learner.training.results import merge
from palimpsest.services.learner.training.trainer import Trainer
from tests.learner_parts.adapters import ADAPTER, LORA, own_adapter, renew
from tests.learner_parts.failing_backward import fail_backward
from tests.learner_parts.models import CPU
from tests.processes.critic_on_ranks import BAD, ONLY, noting
from tests.processes.shard_on_ranks import OPTIMIZER, own_scores, scores
from tests.processes.sharded_versions import Versions
from tests.processes.train_on_ranks import NOW, some_rows
from tests.records.builders import a_learner

ONE = "one micro-batch on each rank, the optimizer in the host's memory"
THREE = "three micro-batches on each rank"
AGAIN = "packed rows, each layer computed again in the backward pass, a divergence from version 0"
UNEVEN = "a rank without rows in one minibatch, and an average of the weights"
CRITIC = "a critic with an adapter of its own"
EXPERTS = "adapters on the attention of a mixture of experts"
FORWARD = "a row on which the forward pass fails in the first layer"
BACKWARD = "a row on which the backward pass fails"
UPPER = "a row on which the backward pass fails, an adapter in the last of four layers only"
FAILING = (FORWARD, BACKWARD, UPPER)
CASES: dict[str, list[list[Row]]] = {
    ONE: [some_rows("i", [20, 20])],
    THREE: [some_rows("j", [35, 35, 33, 33, 31, 31])],
    AGAIN: [some_rows("p", [20, 20, 9, 7])],
    EXPERTS: [some_rows("x", [20, 20])],
    UNEVEN: [some_rows("c", [9, 30, 12]), some_rows("d", [21])],
    CRITIC: [[replace(row, truncated=i == 0) for i, row in enumerate(some_rows("e", [20, 18, 12]))]],
    **{case: [[*some_rows("l", [20, 18]), BAD], some_rows("m", [12])] for case in FAILING},
}
"""Case -> minibatches of one version."""
LOST = Version(3)
"""A version that the store holds for one rank only."""


def learner(case: str) -> LearnerConfig:
    average, again = case == UNEVEN, case == AGAIN
    targets = {UPPER: ("layers.3.mlp.down_proj", "layers.3.self_attn.q_proj"), EXPERTS: ("q_proj", "v_proj")}
    return a_learner(
        advantages={"kind": "gae", "critic": {"lr": 2e-3}} if case == CRITIC else {},
        discrepancy={"band": "off"},
        proximal={"kind": "ewma_prox", "decay": 0.7} if average else {"kind": "bypass"},
        loss={"kl": {"weight": 0.1}} if again else {},
        optimizer=OPTIMIZER.model_dump(),
        lora={"rank": LORA.rank, "alpha": LORA.alpha, "targets": targets.get(case, LORA.targets)},
        micro_batch_tokens=40,
        layout="packed" if again else "padded",
    )


def built(case: str, model: str, ranks: ProcessGroup, *, split: bool) -> tuple[TrainablePolicy, Shards | None, Any]:
    """A policy whose adapter changes what it computes, its shards, and the adapter that it had at first."""
    config, shards = learner(case), None
    layout, attention = ("packed", "sdpa") if case == AGAIN else ("padded", "eager")
    files = ModelFiles(
        model, attention, init_device_mesh("cpu", (ranks.size,), mesh_dim_names=("shard",)), ranks.device,
        layout=layout, lora=config.lora,
    )  # fmt: skip
    torch.manual_seed(5)
    if split:
        whole: Any = files.build(holds=COMPUTES, trains=True)
    else:
        whole = load_model(model, CPU, attention, layout=layout)
        add_adapter(whole, config.lora)
    drawn = {name: tensor.clone() for name, tensor in own_adapter(whole).items()}
    if ranks.is_rank0:
        renew(whole, seed=7)  # the other ranks take over the state of rank 0
    if case == AGAIN:
        whole(checkpoint_activations) if split else checkpoint_activations(whole)
    policy = (AdapterPolicy if split else TrainablePolicy)(whole, OPTIMIZER, offload=case == ONE)
    if isinstance(policy, AdapterPolicy):
        no_store: Any = None
        shards = Shards(policy, files, ranks, VersionPart(no_store, [], threads=1))
    return policy, shards, drawn


def spoil(case: str, model: Any) -> None:
    """Let training passes over the row with the token ONLY fail."""
    causal, error = getattr(model, "causal", model), ValueError(case)
    if case == BACKWARD:
        fail_backward(causal, ONLY, error, layer=1)
    elif case == UPPER:  # the hidden states before the last layer have no gradient
        fail_backward(causal, ONLY, error, layer=-1, after=True)
    elif case == FORWARD:
        seen = [False]

        def look(_: object, arguments: tuple[torch.Tensor]) -> None:
            seen[0] = bool((arguments[0] == ONLY).any())

        def fail(*_: object) -> None:
            if seen[0]:
                raise error

        causal.get_input_embeddings().register_forward_pre_hook(look)
        causal.base_model.layers[0].mlp.register_forward_pre_hook(fail)


def results(case: str, model: str, ranks: ProcessGroup, *, split: bool) -> dict[str, Any]:
    """Results of one version."""
    policy, shards, drawn = built(case, model, ranks, split=split)
    no_store: Any = None
    arguments: dict[str, Any] = {"on_load": lambda _: None, "ranks": ranks, "shards": shards, "adapter": ADAPTER}
    state = build_training_state(learner(case), policy, no_store, CPU, **arguments)
    broadcast_state(policy, state, ranks)
    rows = [row for minibatch in CASES[case] for row in minibatch]
    spoil(case, policy.model)
    gradients: list[list[torch.Tensor]] = []
    of_critic: list[list[torch.Tensor]] = []
    norms: list[float] = []
    policy.step = noting(policy, gradients, norms)  # type: ignore[method-assign]
    if state.critic is not None:
        critic = state.critic.trainable
        critic.step = noting(critic, of_critic, norms)  # type: ignore[method-assign]
    before: dict[str, Any] = {"drawn": drawn, "adapter": _cloned(own_adapter(policy.model))}
    if case not in FAILING:
        before |= {"scores": scores(policy.model, rows, ranks), "own": own_scores(policy.model, rows, ranks)}
    own = Trainer(policy, state, ranks, learner(case), length=64, seed=0).train(CASES[case], NOW)
    together = merge(ranks.all_gather_object(own))
    if isinstance(state.source, EwmaProx):
        before["average"] = state.source.proximal([pad(rows)], NOW).logprobs
    return before | {
        "gradients": gradients,
        "of_critic": of_critic,
        "norms": norms,
        "state": _cloned(policy.state() | state.state()),
        "published": [(each.name, each.raw.tobytes()) for each in raw_tensors(named_weights(policy.model))],
        "rejected": together.rejected,
        "loss": together.loss,
        "gauges": together.gauges,
        "bytes": sum(each.to_local().numel() if isinstance(each, DTensor) else 0 for each in policy.model.parameters()),
    }


def _cloned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@torch.no_grad()
def walked(model: str, ranks: ProcessGroup) -> dict[str, Any]:
    """Move a sharded and a whole shadow over versions of an adapter. Return what both held, and the errors."""
    policy, shards, _ = built(THREE, model, ranks, split=True)
    alone, _, _ = built(THREE, model, ranks, split=False)
    assert shards is not None
    store, batch = Versions(ADAPTER), pad(some_rows("v", [20, 12]))
    for number in range(3):
        renew(policy.model, seed=number)
        weights = [replace(each, raw=each.raw.copy()) for each in raw_tensors(named_weights(policy.model))]
        store.add(Version(number), ranks.broadcast_object(weights))
    if not ranks.is_rank0:
        store.manifests[LOST] = store.manifests[Version(0)]
    any_store: Any = store
    shadow = VersionedAdapter(shards.files.build(holds=COMPUTES, trains=False), any_store, ADAPTER, ranks)
    whole = VersionedModel(copy_trained(alone.model), any_store, ADAPTER)
    held, errors = [], []
    for version in map(Version, (1, 0, 2, LOST, 1)):
        try:
            assert shadow.load_version(version)
        except (UserError, VersionMissing) as error:
            errors.append(str(error))
            continue
        whole.load_version(version)
        held.append(
            [(_cloned(own_adapter(each.model)), score_batch(each.model, batch, CPU)) for each in (shadow, whole)]
        )
    renew(alone.model, seed=2)
    batches = [pad([row]) for row in CASES[THREE][0][:3]]
    canaries = Canaries(alone.model, ranks.device, trajectories=1, micro_batch_tokens=4096)
    return {
        "held": held,
        "errors": errors,
        "canaries": [
            (score_canaries(shards, batches, float32=float32), canaries._values(batches, float32=float32))
            for float32 in (False, True)
        ],
    }


def main(model: str, deep: str, experts: str, folder: Path) -> None:
    """Save one file per case and rank. deep: a model of four layers. experts: a mixture."""
    torch.set_num_threads(1)
    ranks = ProcessGroup(equal_passes=True)
    alone = copy.copy(ranks)
    alone.equal_passes = False
    for case in CASES:
        train = partial(results, case, {UPPER: deep, EXPERTS: experts}.get(case, model))
        saved = {"replicated": train(alone, split=False), "sharded": train(ranks, split=True)}
        torch.save(saved, folder / f"{case} {ranks.rank}.pt")
    torch.save(walked(model, ranks), folder / f"versions {ranks.rank}.pt")
    ranks.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
