"""python -m services.learner.replica RUN.toml --replica.name=replica-0 --replica.port=PORT"""

from common.bus.factory import open_bus
from common.config import Invocation
from common.config.schema import RunConfig
from common.metrics import REGISTRY
from common.program import service
from common.service import Starting, Stop, application
from common.snapshots.client import SnapshotClient
from common.user_error import Refusal


def body(invocation: Invocation, stop: Stop) -> None:
    """Score until the run ends or the process is asked to stop."""
    config = invocation.config
    if config.learner.proximal.kind != "replica":
        raise Refusal(
            f'learner.proximal.kind is "{config.learner.proximal.kind}": nobody would read what a replica scores. Set '
            f'it to "replica", or do without this process'
        )
    own = config.replica
    with Starting("replica", own.host, own.port, key="replica", registry=REGISTRY) as server:
        _score(config, stop, server)


def _score(config: RunConfig, stop: Stop, server: Starting) -> None:
    # torch arrives here: `--check` and a mistake in the run file need not wait for it
    import torch

    from services.learner.model.policy import load_model
    from services.learner.old_logprobs.versioned_model import Resident
    from services.learner.replica.worker import Replica

    torch.set_num_threads(config.replica.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = config.replica
    server.doing = "the log to be opened"
    bus = open_bus(config)
    replica = Replica(
        run=config.run.id, name=own.name, bus=bus, device=device, batch_tokens=own.batch_tokens, stop=stop
    )
    app = application("replica", registry=REGISTRY, ready=replica.waiting_for, status=replica.status)
    server.show(app)
    with SnapshotClient(config.store_url, ca_file=config.snapshot_store.ca_file) as store:
        try:
            replica.work(Resident(load_model(config.model.path, device, config.model.attention), store))
        finally:
            bus.close()


if __name__ == "__main__":
    service("learner.replica", body)
