"""Create the topics of a run with explicit settings, and verify existing topics.

An existing topic may have looser settings (longer retention, larger records) but not tighter ones, because it would
delete or refuse trajectories.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kafka import errors
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient

from palimpsest.common.bus.kafka.connection import Connection
from palimpsest.common.bus.port import PARTITIONS_STAY

READABLE_COMPRESSION = ("producer", "uncompressed", "gzip", "zstd")
"""Values of compression.type with which the broker stores records that a reader can decompress."""
KNOWN_S = 3.0
"""Time after which all brokers have the metadata of a new topic, in seconds."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of the topics of a run."""

    replicas: int = 1
    min_insync_replicas: int = 1
    retention_ms: int = 7 * 24 * 3600 * 1000
    max_record_bytes: int = 1 << 20
    """Maximum size of a batch of records. A record must fit into one batch."""

    def options(self) -> dict[str, str]:
        """Return the settings under the names of the broker."""
        return {
            "cleanup.policy": "delete",
            "retention.ms": str(self.retention_ms),
            "retention.bytes": "-1",
            "max.message.bytes": str(self.max_record_bytes),
            "min.insync.replicas": str(self.min_insync_replicas),
            "compression.type": "producer",
        }


class WrongTopic(ValueError):
    """Raised if an existing topic has settings that the run cannot use. The error text has the command to change it."""


def make_topics(connection: Connection, settings: Settings, partitions: Mapping[str, int]) -> None:
    """Create missing topics and check all. Raises WrongTopic with all problems, and UserError if no broker answers."""
    admin = connection.client(KafkaAdminClient)
    try:
        existing = _describe(connection, admin, list(partitions))
        missing = {name: count for name, count in partitions.items() if name not in existing}
        if existing:
            _check(connection, admin, settings, partitions, existing)
        if missing:
            _make(connection, admin, settings, missing)
            _check(connection, admin, settings, missing, _describe(connection, admin, list(missing)))
    finally:
        admin.close()


def partition_count(connection: Connection, topic: str, named: str) -> int:
    """Return the number of partitions of a topic. `named`: its name on the broker.

    Raises LookupError if the topic does not exist.
    """
    admin = connection.client(KafkaAdminClient)
    try:
        existing = _describe(connection, admin, [named])
    finally:
        admin.close()
    if named not in existing:
        raise LookupError(
            f"topic {topic} does not exist on {connection.servers} (as {named}); the run's supervisor or its learner "
            f"creates it at start"
        )
    return len(existing[named]["partitions"])


def topic_option(connection: Connection, named: str, option: str) -> str:
    """Return the value of an option of a topic. `named`: its name on the broker."""
    admin = connection.client(KafkaAdminClient)
    try:
        known_by = time.monotonic() + KNOWN_S
        return connection.retry_until_answered(
            lambda: _options(admin, [named], known_by), doing="read the settings of a topic"
        )[named][option]
    finally:
        admin.close()


def _make(connection: Connection, admin: KafkaAdminClient, settings: Settings, missing: Mapping[str, int]) -> None:
    def make() -> None:
        for name, count in missing.items():
            topic = {name: {"num_partitions": count, "replication_factor": settings.replicas,
                            "configs": settings.options()}}  # fmt: skip
            try:
                admin.create_topics(topic)
            except errors.TopicAlreadyExistsError:
                continue  # another process of the run created it first
            except errors.InvalidReplicationFactorError as error:
                raise WrongTopic(
                    f"topic {name} cannot be created with {settings.replicas} replicas (bus.replicas): {error}"
                ) from None
        admin.wait_for_topics(list(missing))

    connection.retry_until_answered(make, doing="create topics", limit_s=connection.start_limit_s)


def _describe(connection: Connection, admin: KafkaAdminClient, names: list[str]) -> dict[str, Any]:
    def describe() -> dict[str, Any]:
        existing = {}
        for topic in admin.describe_topics(names):
            error = errors.for_code(topic["error_code"])
            if error is errors.NoError:
                existing[topic["name"]] = topic
            elif error is not errors.UnknownTopicOrPartitionError:
                raise error(f"topic {topic['name']}")
        return existing

    return connection.retry_until_answered(describe, doing="describe topics", limit_s=connection.start_limit_s)


def _check(
    connection: Connection,
    admin: KafkaAdminClient,
    settings: Settings,
    partitions: Mapping[str, int],
    existing: Mapping[str, Any],
) -> None:
    known_by = time.monotonic() + KNOWN_S
    options = connection.retry_until_answered(
        lambda: _options(admin, list(existing), known_by),
        doing="read the settings of topics",
        limit_s=connection.start_limit_s,
    )
    problems = [
        problem
        for name, topic in existing.items()
        for problem in _problems(
            connection.servers,
            settings,
            name,
            partitions[name],
            topic,
            options[name],
        )
    ]
    if any(len(topic["partitions"]) != partitions[name] for name, topic in existing.items()):
        problems.append(PARTITIONS_STAY)
    if problems:
        raise WrongTopic("\n".join(problems))


def _options(admin: KafkaAdminClient, names: list[str], known_by: float) -> dict[str, dict[str, str]]:
    """Return topic -> option -> value.

    kafka-python returns no options and no error for a topic that the broker does not show. Until `known_by` this may be
    a topic that is not yet known to all brokers; after that the permission is missing.
    """
    configs = admin.describe_configs(
        [ConfigResource(ConfigResourceType.TOPIC, name) for name in names], config_filter="all"
    )
    options = {name: {option: entry["value"] for option, entry in configs["topic"][name].items()} for name in names}
    if hidden := [name for name in names if not options[name]]:
        late = time.monotonic() > known_by
        kind = errors.TopicAuthorizationFailedError if late else errors.UnknownTopicOrPartitionError
        raise kind(f"the broker does not show the settings (permission DescribeConfigs) of {', '.join(hidden)}")
    return options


def _problems(
    servers: str, settings: Settings, name: str, partitions: int, topic: Any, options: Mapping[str, str]
) -> list[str]:
    """Return the problems of one topic, each with its remedy."""
    problems = []
    if (value := len(topic["partitions"])) != partitions:
        problems.append(f"topic {name} on {servers} has {value} partitions; the run needs {partitions}")
    if (value := min(len(p["replica_nodes"]) for p in topic["partitions"])) < settings.replicas:
        problems.append(
            f"topic {name} on {servers} has {value} replicas; bus.replicas is {settings.replicas}: add replicas with "
            f"kafka-reassign-partitions.sh, or set bus.replicas to {value}"
        )
    wrong = {
        option: required
        for option, required in settings.options().items()
        if not _suffices(option, options.get(option, ""), required)
    }
    for option, required in wrong.items():
        problems.append(f"topic {name} on {servers} has {option} = {options.get(option)}; the run needs {required}")
    if wrong:
        listed = ",".join(f"{option}={required}" for option, required in wrong.items())
        problems.append(
            f"  to change it: kafka-configs.sh --bootstrap-server {servers} --alter --entity-type topics "
            f"--entity-name {name} --add-config {listed}"
        )
    return problems


def _suffices(option: str, value: str, required: str) -> bool:
    """Whether the value of an option is at least as permissive as the required one.

    >>> _suffices("retention.ms", "-1", "1000"), _suffices("retention.bytes", "1000", "-1")
    (True, False)
    """
    if option == "cleanup.policy":
        return value == required
    if option == "compression.type":
        return value in READABLE_COMPRESSION
    try:
        number = int(value)
    except ValueError:
        return False
    unlimited = option.startswith("retention.") and number == -1
    return unlimited or (required != "-1" and number >= int(required))
