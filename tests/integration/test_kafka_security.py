"""A Kafka that requires TLS, certificates, logins and rights: accepted clients, and the errors of refused ones."""

import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    KafkaAdminClient,
    ResourcePattern,
    ResourceType,
)

from palimpsest.common.bus.factory import open_bus
from palimpsest.common.bus.kafka import Connection, KafkaBus, connection
from palimpsest.common.bus.kafka.connection import PASSWORD, USERNAME
from palimpsest.common.bus.kafka.rights import Right, rights
from palimpsest.common.bus.port import Bus, Outgoing
from palimpsest.common.config import load
from palimpsest.common.config.schema import RunConfig
from palimpsest.common.messages import CONTROL, DEAD_LETTERS, OLD_LOGPROBS, TASKS, TRAJECTORIES, WORKERS
from palimpsest.common.user_error import ExitCode, UserError
from tests.contract.logs import take
from tools.backends.kafka import USER, Kafka, Security
from tools.backends.ports import free

pytestmark = pytest.mark.servers

RUN = 'model.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\nbus.kind = "kafka"\n'
TOPIC_RIGHTS = (
    ACLOperation.CREATE, ACLOperation.DESCRIBE_CONFIGS, ACLOperation.READ, ACLOperation.WRITE,
)  # fmt: skip
"""Rights that docs/operations.md lists; READ and WRITE each include DESCRIBE."""


class Guarded(Kafka):
    """A Kafka with access control lists for logged-in users; the inner listener has all rights."""

    def _settings(self, data: Path) -> dict[str, str]:
        return super()._settings(data) | {
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
        }

    @property
    def inner(self) -> str:
        """Address of the listener that has all rights."""
        return f"127.0.0.1:{self._internal}"

    def allow(self, prefix: str, topics: Sequence[ACLOperation], groups: Sequence[ACLOperation]) -> None:
        """Give the user these rights on all topics and groups with the prefix."""
        kinds = [("topic", operation) for operation in topics] + [("group", operation) for operation in groups]
        self.grant([Right(kind, prefix, (operation.name,), prefixed=True) for kind, operation in kinds])

    def grant(self, rights: Sequence[Right]) -> None:
        """Give the user these rights."""
        with closing(KafkaAdminClient(bootstrap_servers=self.inner)) as admin:
            made = admin.create_acls(
                [
                    ACL(
                        f"User:{USER}", "*", ACLOperation[re.sub("(?<=[a-z])(?=[A-Z])", "_", operation).upper()],
                        ACLPermissionType.ALLOW,
                        ResourcePattern(
                            ResourceType[right.resource.upper()], right.name,
                            ACLResourcePatternType.PREFIXED if right.prefixed else ACLResourcePatternType.LITERAL,
                        ),
                    )
                    for right in rights
                    for operation in right.operations
                ]
            )  # fmt: skip
            assert not made["failed"]


@pytest.fixture(scope="module")
def over_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    with Kafka(tmp_path_factory.mktemp("tls"), security="tls", require_certificate=True) as kafka:
        yield kafka


@pytest.fixture
def tls(over_tls: Kafka) -> Kafka:
    """A broker that requires client certificates."""
    return demanding(over_tls, certificates=True)


def demanding(kafka: Kafka, *, certificates: bool) -> Kafka:
    """Restart the broker if its setting differs, and return it."""
    if kafka.require_certificate != certificates:
        kafka.stop()
        kafka.require_certificate = certificates
        kafka.start()
    return kafka


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with Guarded(tmp_path_factory.mktemp("sasl"), security="sasl_plaintext") as kafka:
        yield kafka


@pytest.fixture(scope="module")
def sasl_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    with Kafka(tmp_path_factory.mktemp("sasl_tls"), security="sasl_tls") as kafka:
        yield kafka


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a run; the environment holds no credentials."""
    for name in (USERNAME, PASSWORD):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)
    return tmp_path


def configured(home: Path, kafka: Kafka, *more: str, security: Security | None = None, run: str = "first") -> RunConfig:
    path = home / "run.toml"
    path.write_text(RUN)
    named = [f"--run.id={run}", f"--run.folder={home}", f"--bus.servers={kafka.servers}"]
    named.append(f"--bus.security={security or kafka.security}")
    return load([str(path), *named, *more], {}, program="").config


def certified(kafka: Kafka) -> list[str]:
    return [
        f"--bus.ca_file={kafka.ca_file}",
        f"--bus.certificate_file={kafka.certificate_file}",
        f"--bus.key_file={kafka.key_file}",
    ]


def goes_through(bus: Bus) -> None:
    """Publish a record, read it without and within a group, and commit it."""
    (at,) = bus.publish(TRAJECTORIES, [Outgoing("g", b"body", {"trajectory": "t"})])
    with bus.consumer(TRAJECTORIES) as alone:
        assert [record.body for record in take(alone, 1)] == [b"body"]
    with bus.consumer(TRAJECTORIES, group="g", member="m") as member:
        assert [record.body for record in take(member, 1)] == [b"body"]
        member.commit({at.partition: at.offset + 1})
    with bus.consumer(TRAJECTORIES, group="g", member="m") as member:
        assert member.poll(limit=1, timeout_s=1.0) == []


@contextmanager
def at_once() -> Iterator[None]:
    """Fail inside the block if a client waits for an error to go away; a waiting client calls `reason`."""

    def waits(_: Connection, problem: Exception) -> str:
        raise AssertionError(f"the client waits although the error is permanent: {problem}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "reason", waits)
        yield


def refused(config: RunConfig) -> str:
    """Message of the immediate error of a run with this configuration."""
    with at_once(), pytest.raises(UserError) as caught:
        open_bus(config).close()
    assert caught.value.code is ExitCode.CONFIGURATION
    return str(caught.value)


def test_a_required_client_certificate_is_sent(home: Path, tls: Kafka) -> None:
    with closing(open_bus(configured(home, tls, *certified(tls)))) as bus:
        goes_through(bus)


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_every_sasl_mechanism_works_over_tls(
    home: Path, sasl_tls: Kafka, mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(USERNAME, sasl_tls.username)
    monkeypatch.setenv(PASSWORD, sasl_tls.password)
    more = [f"--bus.ca_file={sasl_tls.ca_file}", f"--bus.sasl_mechanism={mechanism}"]
    with closing(open_bus(configured(home, sasl_tls, *more, run=mechanism.lower()))) as bus:
        goes_through(bus)
    monkeypatch.setenv(PASSWORD, "wrong")
    assert "the login of" in refused(configured(home, sasl_tls, *more))


def test_a_listener_with_tls_and_login_requires_both(
    home: Path, sasl_tls: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(USERNAME, sasl_tls.username)
    monkeypatch.setenv(PASSWORD, sasl_tls.password)
    trusting = f"--bus.ca_file={sasl_tls.ca_file}"
    assert "its listener uses TLS" in refused(configured(home, sasl_tls, security="plaintext"))
    assert "its listener uses TLS" in refused(configured(home, sasl_tls, security="sasl_plaintext"))
    assert "it requires a login" in refused(configured(home, sasl_tls, trusting, security="tls"))
    assert "its certificate is not trusted" in refused(configured(home, sasl_tls))


def test_the_rights_in_the_manual_suffice_with_credentials_in_files(
    home: Path, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ((USERNAME, guarded.username), (PASSWORD, guarded.password)):
        (home / name).write_text(f"{value}\n")
        monkeypatch.setenv(f"{name}_FILE", str(home / name))
    guarded.allow("palimpsest.first.", TOPIC_RIGHTS, [ACLOperation.READ])
    with closing(open_bus(configured(home, guarded))) as bus:
        goes_through(bus)


def test_the_rights_of_a_worker_suffice_for_its_topics_and_for_no_others(
    home: Path, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(USERNAME, guarded.username)
    monkeypatch.setenv(PASSWORD, guarded.password)
    by_the_learner = configured(home, guarded, f"--bus.servers={guarded.inner}", security="plaintext", run="worker")
    with closing(open_bus(by_the_learner)) as bus:
        bus.publish(TASKS, [Outgoing("g", b"task")])
    guarded.grant(rights("rollout", "palimpsest.worker."))
    with closing(open_bus(configured(home, guarded, run="worker"))) as bus:
        for topic in (TRAJECTORIES, WORKERS, DEAD_LETTERS):
            assert len(bus.publish(topic, [Outgoing("g", b"body")])) == 1
        with bus.consumer(TASKS, group="rollout", member="worker-0") as member:
            (task,) = take(member, 1)
            member.commit({task.partition: task.offset + 1})
        for topic in (TASKS, CONTROL, OLD_LOGPROBS):
            with at_once(), pytest.raises(UserError, match=r"refuses access: .*TopicAuthorizationFailed"):
                bus.publish(topic, [Outgoing("g", b"made up")])
        with (
            at_once(),
            pytest.raises(UserError, match=r"refuses access: .*TopicAuthorizationFailed"),
            bus.consumer(TRAJECTORIES) as other,
        ):
            take(other, 1)


@pytest.mark.parametrize("missing", [*(right.name for right in TOPIC_RIGHTS), "GROUP"])
def test_each_right_in_the_manual_is_needed(
    home: Path, guarded: Guarded, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(USERNAME, guarded.username)
    monkeypatch.setenv(PASSWORD, guarded.password)
    run = f"without-{missing.lower()}"
    rights = [right for right in TOPIC_RIGHTS if right.name != missing]
    guarded.allow(f"palimpsest.{run}.", rights, [] if missing == "GROUP" else [ACLOperation.READ])
    with (
        at_once(),
        pytest.raises(
            UserError, match=r"refuses access: .*AuthorizationFailed.*permissions that docs/operations.md lists"
        ) as error,
        closing(open_bus(configured(home, guarded, run=run))) as bus,
    ):
        goes_through(bus)
    assert error.value.code is ExitCode.CONFIGURATION


@pytest.mark.parametrize(
    ("username", "password", "mechanism"),
    [(USER, "wrong", "PLAIN"), (USER, "wrong", "SCRAM-SHA-512"), ("nobody", "wrong", "SCRAM-SHA-256")],
)
def test_a_wrong_login_fails_at_once(
    home: Path, guarded: Guarded, username: str, password: str, mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(USERNAME, username)
    monkeypatch.setenv(PASSWORD, password)
    error = refused(configured(home, guarded, f"--bus.sasl_mechanism={mechanism}"))
    assert f"the login of '{username}' failed" in error
    assert all(key in error for key in (guarded.servers, USERNAME, PASSWORD, f"bus.sasl_mechanism ({mechanism})"))
    assert password not in error


def test_the_error_for_a_wrong_protocol_names_the_right_setting(
    home: Path, tls: Kafka, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "it requires a login: bus.security must be sasl_" in refused(configured(home, guarded, security="plaintext"))
    assert "its listener does not use TLS: bus.security must be plaintext or sasl_plaintext" in refused(
        configured(home, guarded, security="tls")
    )
    assert "its listener uses TLS: bus.security must be tls or sasl_tls" in refused(
        configured(home, tls, security="plaintext")
    )
    monkeypatch.setenv(USERNAME, "u")
    monkeypatch.setenv(PASSWORD, "p")
    assert "its listener has no SASL login: bus.security must be plaintext or tls" in refused(
        configured(home, tls, *certified(tls), security="sasl_tls")
    )


def test_the_error_for_an_unusable_certificate_names_its_key(home: Path, tls: Kafka) -> None:
    ours = certified(tls)
    assert "its certificate is not trusted (unable to get local issuer certificate): bus.ca_file" in refused(
        configured(home, tls)
    )
    assert "it does not accept the client certificate" in refused(configured(home, tls, ours[0]))
    assert "bus.certificate_file and bus.key_file" in refused(configured(home, tls, ours[0]))
    absent = home / "absent.pem"
    assert f"bus.ca_file = '{absent}'" in refused(configured(home, tls, f"--bus.ca_file={absent}"))
    assert f"bus.key_file = '{absent}'" in refused(configured(home, tls, *ours[:2], f"--bus.key_file={absent}"))


def test_an_unreachable_broker_is_retried_and_then_named(home: Path, kafka_server: Kafka) -> None:
    config = configured(home, kafka_server)
    closed = f"127.0.0.1:{free()}"
    for servers, reason in ((closed, "Connection refused"), ("nowhere.invalid:9092", "unknown host")):
        unreachable = replace(connection(config.bus, {}), servers=servers, start_limit_s=1.0)
        with pytest.raises(UserError, match=rf"Kafka at {servers} \(bus.servers\): .*{reason}") as error:
            KafkaBus(unreachable, prefix="t.")
        assert error.value.code is ExitCode.UNAVAILABLE


def test_one_reachable_broker_of_the_list_is_enough(home: Path, kafka_server: Kafka) -> None:
    config = configured(home, kafka_server, f"--bus.servers=127.0.0.1:{free()},{kafka_server.servers}")
    with closing(open_bus(config)) as bus:
        assert len(bus.publish(TASKS, [Outgoing("g", b"")])) == 1


def test_a_broker_with_optional_certificates_accepts_a_client_without_one(home: Path, over_tls: Kafka) -> None:
    kafka = demanding(over_tls, certificates=False)  # must be the last test: the others need required certificates
    with closing(open_bus(configured(home, kafka, f"--bus.ca_file={kafka.ca_file}"))) as bus:
        goes_through(bus)
