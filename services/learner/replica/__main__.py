"""python -m palimpsest.services.learner.replica RUN.toml --replica.name=replica-0 --replica.port=PORT"""

import os

from palimpsest.common.base_model import own_adapter
from palimpsest.common.bus.factory import open_bus
from palimpsest.common.config import Invocation
from palimpsest.common.config.proximal import PROXIMAL_KINDS
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.control.credentials import open_access
from palimpsest.common.metrics import REGISTRY
from palimpsest.common.model_limits import refuse_limits, refuse_tokenizer
from palimpsest.common.program import service
from palimpsest.common.service import Starting, Stop
from palimpsest.common.snapshots.client import SnapshotClient
from palimpsest.common.snapshots.control_check import ControlCheck
from palimpsest.common.snapshots.held_name import HeldName
from palimpsest.common.user_error import UserError


def body(invocation: Invocation, stop: Stop) -> None:
    """Score until the run ends or a stop is requested."""
    config = invocation.config
    if not PROXIMAL_KINDS[config.learner.proximal.kind].runs_replicas:
        raise UserError(
            f'learner.proximal.kind is "{config.learner.proximal.kind}", so no process reads the scores of a replica. '
            f'Set it to "replica", or do not start a replica'
        )
    refuse_limits(config)
    own = config.replica
    access = open_access(os.environ, own.host)
    with Starting("replica", own.host, own.port, key="replica", registry=REGISTRY, access=access) as server:
        _score(config, stop, server)


def _score(config: RunConfig, stop: Stop, server: Starting) -> None:
    # imports torch: `--check` and an error in the run file must not wait for it
    import torch

    from palimpsest.services.learner.model.policy import load_policy
    from palimpsest.services.learner.old_logprobs.version_source import source_of_replica
    from palimpsest.services.learner.old_logprobs.versioned_model import VersionedModel
    from palimpsest.services.learner.replica.worker import ReplicaWorker

    torch.set_num_threads(config.replica.threads)
    refuse_tokenizer(config.model.path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = config.replica
    server.doing = "the log to be opened"
    bus = open_bus(config)
    replica = ReplicaWorker(
        run=config.run.id,
        name=own.name,
        bus=bus,
        device=device,
        batch_tokens=own.batch_tokens,
        max_staleness=config.learner.max_staleness,
        versions=config.learner.versions,
        stop=stop,
    )
    server.show_service(ready=replica.waiting_for, status=replica.status)
    with SnapshotClient(config.store_url, ca_file=config.snapshot_store.ca_file) as store:
        try:
            with HeldName(store, "replica", own.name, key="replica.name", on_lost=replica.fail, pause=stop.wait):
                source = source_of_replica(config, store)
                model = VersionedModel(load_policy(config, device), source, own_adapter(config))
                replica.work(model, ControlCheck(store))
        finally:
            bus.close()


if __name__ == "__main__":
    service("learner.replica", body)
