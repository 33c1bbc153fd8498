"""Topics as the run needs them: made with stated settings, and verified where they stand already.

A topic that someone else made may be generous (longer retention, larger records) but not tighter: what it would cut
off or refuse is a trajectory.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kafka import errors
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient

from palimpsest.common.bus.kafka.connection import Connection
from palimpsest.common.bus.port import PARTITIONS_STAY

KNOWN_S = 3.0
"""A new topic is known to all brokers after this time."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Of every topic of a run."""

    replicas: int = 1
    min_insync_replicas: int = 1
    retention_ms: int = 7 * 24 * 3600 * 1000
    max_record_bytes: int = 1 << 20
    """Longest batch of records on the wire; a record has to fit into one."""

    def options(self) -> dict[str, str]:
        """As the broker names them."""
        return {
            "cleanup.policy": "delete",
            "retention.ms": str(self.retention_ms),
            "retention.bytes": "-1",
            "max.message.bytes": str(self.max_record_bytes),
            "min.insync.replicas": str(self.min_insync_replicas),
        }


class WrongTopic(ValueError):
    """A topic stands there with settings the run cannot use; the message has the command that mends it."""


def make_topics(connection: Connection, settings: Settings, partitions: Mapping[str, int]) -> None:
    """Make those that are missing, check all. Raises WrongTopic, naming every problem; UserError when nobody
    answers."""
    admin = connection.client(KafkaAdminClient)
    try:
        standing = _describe(connection, admin, list(partitions))
        missing = {name: count for name, count in partitions.items() if name not in standing}
        if standing:
            _check(connection, admin, settings, partitions, standing)
        if missing:
            _make(connection, admin, settings, missing)
            _check(connection, admin, settings, missing, _describe(connection, admin, list(missing)))
    finally:
        admin.close()


def partition_count(connection: Connection, topic: str, named: str) -> int:
    """How many partitions a topic has, `named` so at the broker. Raises LookupError when it does not exist."""
    admin = connection.client(KafkaAdminClient)
    try:
        standing = _describe(connection, admin, [named])
    finally:
        admin.close()
    if named not in standing:
        raise LookupError(
            f"topic {topic} does not exist on {connection.servers} (as {named}); the run's supervisor or its learner "
            f"creates it at start"
        )
    return len(standing[named]["partitions"])


def _make(connection: Connection, admin: KafkaAdminClient, settings: Settings, missing: Mapping[str, int]) -> None:
    def make() -> None:
        for name, count in missing.items():
            wanted = {name: {"num_partitions": count, "replication_factor": settings.replicas,
                             "configs": settings.options()}}  # fmt: skip
            try:
                admin.create_topics(wanted)
            except errors.TopicAlreadyExistsError:
                continue  # another process of the run was quicker
            except errors.InvalidReplicationFactorError as error:
                raise WrongTopic(
                    f"topic {name} cannot be made with {settings.replicas} replicas (bus.replicas): {error}"
                ) from None
        admin.wait_for_topics(list(missing))

    connection.retry_until_answered(make, doing="make topics", limit_s=connection.start_limit_s)


def _describe(connection: Connection, admin: KafkaAdminClient, names: list[str]) -> dict[str, Any]:
    def describe() -> dict[str, Any]:
        standing = {}
        for topic in admin.describe_topics(names):
            error = errors.for_code(topic["error_code"])
            if error is errors.NoError:
                standing[topic["name"]] = topic
            elif error is not errors.UnknownTopicOrPartitionError:
                raise error(f"topic {topic['name']}")
        return standing

    return connection.retry_until_answered(describe, doing="look at topics", limit_s=connection.start_limit_s)


def _check(
    connection: Connection,
    admin: KafkaAdminClient,
    settings: Settings,
    partitions: Mapping[str, int],
    standing: Mapping[str, Any],
) -> None:
    known_by = time.monotonic() + KNOWN_S
    options = connection.retry_until_answered(
        lambda: _options(admin, list(standing), known_by), doing="look at topics", limit_s=connection.start_limit_s
    )
    problems = [
        problem
        for name, topic in standing.items()
        for problem in _problems(
            connection.servers,
            settings,
            name,
            partitions[name],
            topic,
            options[name],
        )
    ]
    if any(len(topic["partitions"]) != partitions[name] for name, topic in standing.items()):
        problems.append(PARTITIONS_STAY)
    if problems:
        raise WrongTopic("\n".join(problems))


def _options(admin: KafkaAdminClient, names: list[str], known_by: float) -> dict[str, dict[str, str]]:
    """Topic -> option -> value. kafka-python leaves out what the broker did not show, and why."""
    found = admin.describe_configs(
        [ConfigResource(ConfigResourceType.TOPIC, name) for name in names], config_filter="all"
    )
    options = {name: {option: entry["value"] for option, entry in found["topic"][name].items()} for name in names}
    if hidden := [name for name in names if not options[name]]:
        late = time.monotonic() > known_by
        kind = errors.TopicAuthorizationFailedError if late else errors.UnknownTopicOrPartitionError
        raise kind(f"settings not shown (right DescribeConfigs) of {', '.join(hidden)}")
    return options


def _problems(
    servers: str, settings: Settings, name: str, partitions: int, topic: Any, options: Mapping[str, str]
) -> list[str]:
    """What is wrong with one topic, each with its remedy."""
    problems = []
    if (has := len(topic["partitions"])) != partitions:
        problems.append(f"topic {name} on {servers} has {has} partitions, {partitions} are asked for")
    if (has := min(len(p["replica_nodes"]) for p in topic["partitions"])) < settings.replicas:
        problems.append(
            f"topic {name} on {servers} has {has} replicas, bus.replicas asks for {settings.replicas}: "
            f"kafka-reassign-partitions.sh adds some, or set bus.replicas to {has}"
        )
    wrong = {
        option: wanted
        for option, wanted in settings.options().items()
        if not _suffices(option, options.get(option, ""), wanted)
    }
    for option, wanted in wrong.items():
        problems.append(f"topic {name} on {servers} has {option} = {options.get(option)}, the run needs {wanted}")
    if wrong:
        listed = ",".join(f"{option}={wanted}" for option, wanted in wrong.items())
        problems.append(
            f"  mend it: kafka-configs.sh --bootstrap-server {servers} --alter --entity-type topics "
            f"--entity-name {name} --add-config {listed}"
        )
    return problems


def _suffices(option: str, has: str, wanted: str) -> bool:
    """Whether a setting keeps at least what the wanted one would.

    >>> _suffices("retention.ms", "-1", "1000"), _suffices("retention.bytes", "1000", "-1")
    (True, False)
    """
    if option == "cleanup.policy":
        return has == wanted
    try:
        number = int(has)
    except ValueError:
        return False
    unlimited = option.startswith("retention.") and number == -1
    return unlimited or (wanted != "-1" and number >= int(wanted))
