"""The `bus` section. docs/configuration.md is generated from the docstrings under the keys."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from palimpsest.common.config.section import FilePath, Positive, PositiveFloat, Section


class BusConfig(Section):
    """The log between the services."""

    kind: Literal["sqlite", "kafka"] = "sqlite"
    """`sqlite`: one file, shared by the processes of one machine. `kafka`: the Apache Kafka cluster at `servers`."""
    path: FilePath | None = None
    """The SQLite file. Default: `bus.sqlite` in the run's folder."""
    servers: str = ""
    """Kafka bootstrap servers: `host:port`, separated by commas."""
    topic_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{0,150}$")] = ""
    """Prefix of the topic names. Default: `palimpsest.ID.`, where ID is `run.id`."""
    task_partitions: Positive = 8
    """Partitions of `tasks`, which is the maximum number of rollout workers that share the tasks."""
    trajectory_partitions: Positive = 4
    """Partitions of `trajectories`."""
    replicas: Positive = 1
    """Replication factor of each partition (Kafka). Use 3 to survive the loss of a broker."""
    min_insync_replicas: Positive = 1
    """Replicas that must have a record before the write succeeds (Kafka). Use 2 with 3 replicas."""
    retention_hours: PositiveFloat = 168.0
    """Retention of records in hours (Kafka). Must be longer than any pause of the run."""
    max_record_bytes: Annotated[int, Field(ge=65536)] = 1048576
    """Maximum size of a record on the log (Kafka): `max.message.bytes` of the topics."""
    claim_bytes: Annotated[int, Field(ge=1024)] = 524288
    """Size above which the snapshot store holds the body of a record; the record on the log then carries only the
    digest (Kafka)."""
    outage_limit_s: PositiveFloat = 600.0
    """Maximum outage of the log, in seconds (Kafka). The process retries during the outage and exits after the
    limit."""
    security: Literal["plaintext", "tls", "sasl_plaintext", "sasl_tls"] = "plaintext"
    """Security protocol of the brokers. User and password: PALIMPSEST_KAFKA_USERNAME, PALIMPSEST_KAFKA_PASSWORD."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    """SASL mechanism, with `sasl_plaintext` and `sasl_tls`."""
    ca_file: FilePath | None = None
    """CA certificates (PEM) that verify the brokers. Default: the CA certificates of the system."""
    certificate_file: FilePath | None = None
    """Client certificate (PEM), for brokers that require one."""
    key_file: FilePath | None = None
    """Private key (PEM) of the client certificate."""

    @model_validator(mode="after")
    def _kafka_is_named(self) -> "BusConfig":
        if self.kind == "kafka" and not self.servers:
            raise ValueError("bus.kind is kafka, so bus.servers must name a broker, for example localhost:9092")
        if self.claim_bytes >= self.max_record_bytes:
            raise ValueError(
                f"bus.claim_bytes ({self.claim_bytes}) must be below bus.max_record_bytes ({self.max_record_bytes}): "
                f"a record that is not sent as a claim must fit into one message, headers included"
            )
        if self.min_insync_replicas > self.replicas:
            raise ValueError(
                f"bus.min_insync_replicas ({self.min_insync_replicas}) is more than bus.replicas ({self.replicas}): "
                f"every write would fail"
            )
        return self
