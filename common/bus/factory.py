"""Open the log of a run from its configuration."""

from palimpsest.common.bus.claim_check import Claims
from palimpsest.common.bus.port import Bus
from palimpsest.common.bus.sqlite import SqliteBus
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.messages import CONTROL, DEAD_LETTERS, OLD_LOGPROBS, TASKS, TRAJECTORIES, WORKERS
from palimpsest.common.user_error import UserError


def open_bus(config: RunConfig) -> Bus:
    """Open the log of the run and create its topics.

    Raises UserError if a topic exists with other settings, or if no broker answers.
    """
    bus = connect(config)
    try:
        bus.create_topics(
            {
                TASKS: config.bus.task_partitions,
                TRAJECTORIES: config.bus.trajectory_partitions,
                CONTROL: 1,
                WORKERS: 1,
                OLD_LOGPROBS: config.bus.trajectory_partitions,
                DEAD_LETTERS: 1,
            }
        )
    except ValueError as error:
        bus.close()
        raise UserError(str(error)) from None
    except UserError:
        bus.close()
        raise
    return bus


def connect(config: RunConfig, claims: Claims | None = None) -> Bus:
    """Open the log of the run without creating topics. `claims`: store of long bodies; default: the snapshot store."""
    return _kafka(config, claims) if config.bus.kind == "kafka" else SqliteBus(config.bus_path)


def _kafka(config: RunConfig, claims: Claims | None) -> Bus:
    # imported here, because a run with the SQLite log does not need kafka-python
    from palimpsest.common.bus.claim_check import ClaimCheck
    from palimpsest.common.bus.claim_check_store import StoreClaims
    from palimpsest.common.bus.kafka import KafkaBus, Settings, connection
    from palimpsest.common.snapshots.client import SnapshotClient

    settings = Settings(
        replicas=config.bus.replicas,
        min_insync_replicas=config.bus.min_insync_replicas,
        retention_ms=int(config.bus.retention_hours * 3_600_000),
        max_record_bytes=config.bus.max_record_bytes,
    )
    bus = KafkaBus(connection(config.bus), prefix=config.topic_prefix, settings=settings)
    if claims is None:
        claims = StoreClaims(SnapshotClient(config.store_url, ca_file=config.snapshot_store.ca_file))
    return ClaimCheck(bus, claims, over_bytes=config.bus.claim_bytes)
