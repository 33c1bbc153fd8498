"""python -m palimpsest.services.learner RUN.toml

Several ranks:
python -m palimpsest.services.learner.torchrun --standalone --nproc-per-node=2 -m palimpsest.services.learner RUN.toml

palimpsest dead-letters list RUN.toml     (see `palimpsest dead-letters --help`)
"""

import os
import sys
from functools import partial

from palimpsest.common.base_model import own_adapter
from palimpsest.common.config import Invocation
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.control.credentials import open_access
from palimpsest.common.metrics import REGISTRY
from palimpsest.common.model_limits import refuse_limits, refuse_tokenizer
from palimpsest.common.parent_death import die_with_parent
from palimpsest.common.program import main, print_line, service
from palimpsest.common.service import Starting, Stop
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.startup_objects import without_collections
from palimpsest.common.trajectory_limit import trajectory_limit
from palimpsest.common.user_error import UserError


def body(invocation: Invocation, stop: Stop) -> None:
    """Train until all versions are done or a stop is requested."""
    learner = invocation.config.learner
    refuse_limits(invocation.config)
    if os.environ.get("RANK", "0") != "0":
        _train(invocation.config, stop, None)
        return
    access = open_access(os.environ, learner.host)
    with Starting("learner", learner.host, learner.port, key="learner", registry=REGISTRY, access=access) as server:
        _train(invocation.config, stop, server)


def _train(config: RunConfig, stop: Stop, server: Starting | None) -> None:
    """server: of rank 0, the only rank that uses the log and answers requests; None on other ranks."""
    # imports torch: `--check` and an error in the run file must not wait for it
    with without_collections():
        import torch
        import transformers.modeling_utils  # noqa: F401 (loading the model imports it)

        from palimpsest.services.learner import instruments
        from palimpsest.services.learner.agreement import refuse_disagreement
        from palimpsest.services.learner.coordinator import run_coordinator
        from palimpsest.services.learner.distributed import ProcessGroup
        from palimpsest.services.learner.loop_parts import Training
        from palimpsest.services.learner.model.routing import refuse_unroutable
        from palimpsest.services.learner.old_logprobs.distributed_scorer import model_scorer
        from palimpsest.services.learner.old_logprobs.version_source import source_of_rank
        from palimpsest.services.learner.sharding.build import build_shards
        from palimpsest.services.learner.training.build import build_training_state
        from palimpsest.services.learner.training.build_policy import build_policy, read_start
        from palimpsest.services.learner.training.follower import run_follower
        from palimpsest.services.learner.training.trainer import Trainer

    torch.set_num_threads(config.learner.threads)
    torch.manual_seed(config.run.seed)
    sharded = config.learner.sharding != "none"
    ranks = ProcessGroup(equal_passes=sharded)
    refuse_disagreement(config, ranks)  # before anything that all ranks must do alike
    ranks.share_rows(config.learner.context_parallel)
    if server is not None:
        server.doing = "the model to be loaded"
        refuse_tokenizer(config.model.path)
    adapter = own_adapter(config)
    kept = config.snapshot_store
    with SnapshotClient(
        config.store_url,
        compression=kept.compression,
        ca_file=kept.ca_file,
        sleep_without_room=partial(wait_for_room, stop),
    ) as store:
        begin = partial(read_start, config=config, ranks=ranks, store=store, adapter=adapter)
        shards = build_shards(config, ranks, store, begin) if sharded else None
        policy = shards.policy if shards is not None else build_policy(config, ranks, store, adapter)
        if config.learner.routing_replay != "none":
            refuse_unroutable(policy.model)
        state = build_training_state(
            config.learner,
            policy,
            source_of_rank(config, store, ranks),
            ranks.device,
            on_load=lambda _: instruments.SNAPSHOT_LOADS.inc(),
            ranks=ranks,
            shards=shards,
            adapter=adapter,
        )
        trainer = Trainer(
            policy,
            state,
            ranks,
            config.learner,
            length=trajectory_limit(config).tokens,
            seed=config.run.seed,
        )
        forward = model_scorer(policy.model, ranks.device)
        if server is not None:
            training = Training(trainer, policy, state, ranks, shards)
            run_coordinator(config, stop, store, training, forward, server, adapter)
        else:
            run_follower(policy, state, trainer, ranks, forward, shards)
    ranks.close()


def wait_for_room(stop: Stop, seconds: float) -> None:
    """Pause while the store has no room for a version; the wait may take hours, so it ends with the stop: UserError."""
    if stop.wait(seconds):
        raise UserError(
            "stopped while the snapshot store had no room for a version; resume the run when it has room: the version "
            "is trained again from the checkpoint",
            stop.code,
        )


def dead_letters() -> None:
    """List or replay dead letters."""
    from palimpsest.services.learner.dead_letters.command import run_command

    for line in run_command(sys.argv[2:], os.environ):
        print_line(line)


if __name__ == "__main__":
    if sys.argv[1:2] == ["dead-letters"]:
        main(dead_letters)
        sys.exit()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun starts each rank in its own session, so its ranks would survive it and continue training
        die_with_parent(os.getppid())
    service("learner", body)
