"""Rights of each role on the topics and groups of a run, as access control lists of Kafka. Pure.

A role writes only its own topics, so that a worker cannot announce a version or end a run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from palimpsest.common.messages import CONTROL, DEAD_LETTERS, OLD_LOGPROBS, TASKS, TOPICS, TRAJECTORIES, WORKERS


@dataclass(frozen=True, slots=True)
class Right:
    """Operations on one topic or group, or on all whose names begin with `name`."""

    resource: str
    """`topic` or `group`."""
    name: str
    operations: tuple[str, ...]
    """As kafka-acls.sh names them."""
    prefixed: bool = False

    def flags(self) -> str:
        """Return the flags of kafka-acls.sh."""
        pattern = "--resource-pattern-type prefixed " if self.prefixed else ""
        return f"{pattern}--{self.resource} {self.name} " + " ".join(f"--operation {name}" for name in self.operations)


@dataclass(frozen=True, slots=True)
class RoleRights:
    """What a role does on the log."""

    does: str
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    group: str = ""
    """The consumer group that it joins."""
    creates: bool = False
    """Whether it creates the topics."""


ROLES: Mapping[str, RoleRights] = {
    "learner": RoleRights(
        "the learner",
        writes=(TASKS, CONTROL, OLD_LOGPROBS, DEAD_LETTERS),
        reads=TOPICS,
        creates=True,
    ),
    "rollout": RoleRights(
        "a rollout worker", writes=(TRAJECTORIES, WORKERS, DEAD_LETTERS), reads=(TASKS, CONTROL), group="rollout"
    ),
    "replica": RoleRights(
        "a replica",
        writes=(OLD_LOGPROBS,),
        reads=(TRAJECTORIES, CONTROL, OLD_LOGPROBS),
        group="replica",
    ),
    "observer": RoleRights(
        "`palimpsest run`, `report`, `audit`, `export` and `dead-letters list`",
        writes=(DEAD_LETTERS,),
        reads=TOPICS,
        creates=True,
    ),
    "replay": RoleRights(
        "`palimpsest dead-letters replay`",
        writes=tuple(topic for topic in TOPICS if topic != DEAD_LETTERS),
        reads=TOPICS,
    ),
}
"""Role -> its rights. The gateway and the store use no topic."""


def rights(role: str, prefix: str) -> list[Right]:
    """Return the rights of a role. prefix: of the run's topics and groups (`bus.topic_prefix`).

    Every role describes all topics, because it checks their settings at its start.
    """
    found = ROLES[role]
    general = ("Describe", "DescribeConfigs", *(("Create",) if found.creates else ()))
    granted = [Right("topic", prefix, general, prefixed=True)]
    for topic in TOPICS:
        operations = [name for name, topics in (("Read", found.reads), ("Write", found.writes)) if topic in topics]
        if operations:
            granted.append(Right("topic", f"{prefix}{topic}", tuple(operations)))
    return granted + ([Right("group", f"{prefix}{found.group}", ("Read",))] if found.group else [])


def commands(principals: Mapping[str, str], prefix: str, servers: str) -> Sequence[str]:
    """Return the kafka-acls.sh commands that give each role's principal its rights. principals: role -> principal."""
    start = f"kafka-acls.sh --bootstrap-server {servers} --add"
    return [
        f"{start} --allow-principal {principal} {right.flags()}"
        for role, principal in principals.items()
        for right in rights(role, prefix)
    ]
