"""Train a policy and its critic under torchrun, replicated and split over the ranks, and save both results.

torchrun --standalone --nproc-per-node=N -m tests.processes.critic_on_ranks MODEL FOLDER write|read|shared

shared: the cases with a row that fails, on ranks that share rows.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from palimpsest.common.config.learner import LearnerConfig
from palimpsest.services.learner.batch.batching import Row, pad
from palimpsest.services.learner.distributed import ProcessGroup
from palimpsest.services.learner.model.critic import Critic
from palimpsest.services.learner.model.device_batch import on_device
from palimpsest.services.learner.model.policy import checkpoint_activations, load_model
from palimpsest.services.learner.model.trainable import TrainablePolicy
from palimpsest.services.learner.sharding.load import ModelFiles
from palimpsest.services.learner.sharding.shard_files import write_shards
from palimpsest.services.learner.sharding.sharded_policy import ShardedPolicy
from palimpsest.services.learner.sharding.shared_work import Shards
from palimpsest.services.learner.training.build import build_training_state
from palimpsest.services.learner.training.results import merge
from palimpsest.services.learner.training.state import TrainingState
from palimpsest.services.learner.training.trainer import Trainer
from tests.learner_parts.failing_backward import fail_backward
from tests.learner_parts.models import CPU
from tests.processes.shard_on_ranks import OPTIMIZER
from tests.processes.sharded_versions import a_rank
from tests.processes.train_on_ranks import NOW, some_rows
from tests.records.builders import a_learner, a_row

ONLY = 253
"""A token that one row has."""
ONE = "one micro-batch on each rank"
AGAIN = "one micro-batch of packed rows, each layer computed again in the backward pass"
UNEVEN = "unevenly many micro-batches, of which one rank has a truncated row"
FORWARD = "a row on which the critic's forward pass fails"
BACKWARD = "a row on which the critic's backward pass fails"
POLICY = "a row on which the policy's backward pass fails"
FAILING = (FORWARD, BACKWARD, POLICY)
SINGLE = (ONE, AGAIN, *FAILING)
"""Cases with one micro-batch on each rank."""


def limited(rows: list[Row], *places: int) -> list[Row]:
    """The rows, of which some reached a limit."""
    return [replace(row, truncated=i in places) for i, row in enumerate(rows)]


BAD = a_row("bad", [5, 9, ONLY, 8, 11], [-1, -1, NOW, NOW, NOW], advantage=0.7)
CASES = {
    ONE: [limited(some_rows("i", [20, 20]), 1)],
    AGAIN: [limited(some_rows("p", [20, 20, 9, 7]), 0, 2)],
    UNEVEN: [limited(some_rows("j", [35, 35, 33, 6, 5]), 0), some_rows("k", [12, 40, 7])],
    **{case: [[*some_rows("l", [20, 18]), BAD]] for case in FAILING},
}
"""Case -> minibatches of one version."""


def learner(case: str) -> LearnerConfig:
    return a_learner(
        advantages={"kind": "gae", "lam": 0.9, "critic": {"lr": 2e-3}},
        proximal={"kind": "bypass"},
        optimizer=OPTIMIZER.model_dump(),
        micro_batch_tokens=40,
        layout="packed" if case == AGAIN else "padded",
        activation_checkpointing=case == AGAIN,
    )


def built(
    case: str, model: str, ranks: ProcessGroup, *, split: bool, packed: bool = False
) -> tuple[TrainablePolicy, TrainingState, Shards | None]:
    """A policy and its state; the critic's head is not zero."""
    config, shards = learner(case), None
    layout, attention = ("packed", "sdpa") if packed or case == AGAIN else ("padded", "eager")
    if split:
        mesh = init_device_mesh("cpu", (ranks.size,))
        files = ModelFiles(model, attention, mesh, ranks.device, layout=layout, context=ranks.context)
        policy: Any = ShardedPolicy(files.build(holds=torch.float32, trains=True), OPTIMIZER, ranks)
        if case == AGAIN:
            policy.model(checkpoint_activations)
        shards = a_rank(policy, files, ranks)
    else:
        policy = TrainablePolicy(load_model(model, CPU, attention, layout=layout), OPTIMIZER)
        if case == AGAIN:
            checkpoint_activations(policy.model)
    no_store: Any = None
    state = build_training_state(config, policy, no_store, CPU, on_load=lambda _: None, ranks=ranks, shards=shards)
    assert state.critic is not None
    *_, weight, _ = state.critic.trainable.masters
    weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    state.critic.trainable._publish()
    return policy, state, shards


def spoil(case: str, policy: Any, critic: Any) -> None:
    """Let training passes over the row with the token ONLY fail."""
    error = ValueError(case)
    valued = getattr(critic.model, "causal", critic.model)
    if case == POLICY:
        fail_backward(getattr(policy.model, "causal", policy.model), ONLY, error)
    elif case == BACKWARD:
        fail_backward(valued.decoder, ONLY, error)
    elif case == FORWARD:
        seen = [False]

        def look(_: object, arguments: tuple[torch.Tensor]) -> None:
            seen[0] = bool((arguments[0] == ONLY).any())

        def fail(*_: object) -> None:
            if seen[0] and torch.is_grad_enabled():
                raise error

        valued.decoder.get_input_embeddings().register_forward_pre_hook(look)
        valued.decoder.layers[1].mlp.register_forward_pre_hook(fail)


def noting(trainable: Any, gradients: list[list[torch.Tensor]], norms: list[float]) -> Callable[..., float]:
    """The step, which also notes the whole gradients and their norm."""
    step = trainable.step

    def noted(**named: float) -> float:
        gradients.append([full(parameter.grad) for parameter in _parameters(trainable)])
        norms.append(step(**named))
        return norms[-1]

    return noted


def _parameters(trainable: Any) -> list[Any]:
    return list(trainable.parameters if isinstance(trainable, ShardedPolicy) else trainable.masters)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all of a tensor. All ranks must call it."""
    own = tensor.detach()
    return (own.full_tensor() if isinstance(own, DTensor) else own).clone()


def values(critic: Critic, rows: list[Row]) -> list[torch.Tensor]:
    """Values and final values of all rows."""
    own = on_device(pad(rows), CPU)
    lengths = torch.tensor([len(row.tokens) for row in rows])
    with torch.no_grad():
        return [critic.values(own.tokens, own.rows), critic.final_values(own.tokens, lengths)]


def results(case: str, policy: Any, state: TrainingState, ranks: ProcessGroup) -> dict[str, Any]:
    """Results of one version. Tensors are whole."""
    critic, gradients = state.critic, dict[str, list[list[torch.Tensor]]](policy=[], critic=[])
    assert critic is not None
    everything = [row for minibatch in CASES[case] for row in minibatch]
    before = [] if ranks.context is not None else values(critic, everything)
    spoil(case, policy, critic)
    parts = {"policy": policy, "critic": critic.trainable}
    norms: dict[str, list[float]] = {"policy": [], "critic": []}
    for name, trainable in parts.items():
        trainable.step = noting(trainable, gradients[name], norms[name])
    own = Trainer(policy, state, ranks, learner(case), length=64, seed=0).train(CASES[case], NOW)
    together = merge(ranks.gather_shares(own))
    return {
        "values": before,
        "gradients": gradients,
        "masters": {name: [full(each) for each in _parameters(part)] for name, part in parts.items()},
        "norms": norms,
        "rejected": together.rejected,
        "trained": sorted(row.trajectory for scored in together.micro_batches for row in scored.batch.rows),
        "bytes": sum(4 * master.numel() for master in critic.trainable.masters),
    }


def main(model: str, folder: Path, what: str) -> None:
    """write: save one file per case and rank, and a checkpoint. read: continue from the checkpoint. shared: save one
    file per failing case and rank."""
    torch.set_num_threads(1)
    ranks = ProcessGroup(equal_passes=True)
    if what == "write":
        replicated = copy.copy(ranks)
        replicated.equal_passes = False
        for case in CASES:
            saved: dict[str, Any] = {}
            for name, group in (("replicated", replicated), ("sharded", ranks)):
                policy, state, shards = built(case, model, group, split=group.equal_passes)
                saved[name] = results(case, policy, state, group)
            torch.save(saved, folder / f"{case} {ranks.rank}.pt")
            if case == UNEVEN:
                assert shards is not None
                written = write_shards(shards, folder / "checkpoint")
                torch.save({"state": state.state(), "files": written}, folder / f"state {ranks.rank}.pt")
                torch.save(continued(policy, state), folder / f"written {ranks.rank}.pt")
    elif what == "shared":
        replicated = copy.copy(ranks)
        replicated.equal_passes = False
        ranks.share_rows(ranks.size)
        for case in FAILING:
            saved = {}
            for name, group in (("replicated", replicated), ("sharded", ranks)):
                policy, state, _ = built(case, model, group, split=group.equal_passes, packed=True)
                saved[name] = results(case, policy, state, group)
            torch.save(saved, folder / f"{case}, shared {ranks.rank}.pt")
    else:
        policy, state, _ = built(UNEVEN, model, ranks, split=True)
        policy.source, policy.steps = folder / "checkpoint", 2  # type: ignore[attr-defined]
        state.restore(torch.load(folder / "state 0.pt", weights_only=False)["state"])
        policy.share(ranks)
        torch.save(continued(policy, state), folder / f"read {ranks.rank}.pt")
    ranks.close()


def continued(policy: Any, state: TrainingState) -> dict[str, Any]:
    """What a run continues with."""
    assert state.critic is not None
    return {
        "tensors": {name: full(tensor) for name, tensor in policy.shards().items()},
        "steps": (policy.steps, state.critic.trainable.steps),
        "values": values(state.critic, CASES[UNEVEN][0]),
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
