"""The rights of each role on Kafka are those that its code uses."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from palimpsest.acls_command import command
from palimpsest.common import messages
from palimpsest.common.bus.kafka.rights import ROLES, commands, rights
from palimpsest.common.messages import TOPICS
from palimpsest.common.user_error import UserError

ROOT = Path(__file__).parents[3]
CODE = {"rollout": "services/rollout", "replica": "services/learner/replica", "learner": "services/learner"}
NOT_THE_LEARNER = ("replica", "dead_letters")
"""Folders in services/learner with programs of other roles."""


def calls(role: str) -> Iterator[tuple[str, str]]:
    """Yield function and topic of each call with a topic as its first or second argument."""
    names = {name: value for name, value in vars(messages).items() if value in TOPICS and isinstance(value, str)}
    for path in sorted((ROOT / CODE[role]).rglob("*.py")):
        if role == "learner" and path.relative_to(ROOT / CODE[role]).parts[0] in NOT_THE_LEARNER:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                for argument in node.args[:2]:
                    if isinstance(argument, ast.Name) and argument.id in names:
                        yield called, names[argument.id]


@pytest.mark.parametrize("role", CODE)
def test_a_role_writes_and_reads_the_topics_of_its_code(role: str) -> None:
    found = set(calls(role))
    assert {topic for name, topic in found if name in ("publish", "_put")} == set(ROLES[role].writes)
    read = {topic for name, topic in found if name in ("consumer", "read_existing", "_read_existing_messages")}
    if role == "learner":  # it also checks the ends of all topics
        assert read | {messages.DEAD_LETTERS} == set(ROLES[role].reads)
    else:
        assert read == set(ROLES[role].reads)


def test_the_table_in_the_manual_has_the_rights() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    for role, granted in ROLES.items():
        (row,) = re.findall(rf"^\| `{role}` \|.*$", page, re.MULTILINE)
        _, _, _, writes, reads, group, _ = (cell.strip() for cell in row.split("|"))
        assert topics_in(writes) == set(granted.writes)
        assert topics_in(reads) == set(granted.reads)
        assert group.strip("`") == granted.group


def topics_in(cell: str) -> set[str]:
    named = set(re.findall(r"`(\w+)`", cell))
    return set(TOPICS) - named if cell.startswith("all") else named


def test_the_commands_of_a_worker() -> None:
    start = "kafka-acls.sh --bootstrap-server b:1 --add --allow-principal User:w "
    assert commands({"rollout": "User:w"}, "p.r.", "b:1") == [
        f"{start}--resource-pattern-type prefixed --topic p.r. --operation Describe --operation DescribeConfigs",
        f"{start}--topic p.r.tasks --operation Read",
        f"{start}--topic p.r.trajectories --operation Write",
        f"{start}--topic p.r.control --operation Read",
        f"{start}--topic p.r.workers --operation Write",
        f"{start}--topic p.r.dead_letters --operation Write",
        f"{start}--group p.r.rollout --operation Read",
    ]


def test_only_learner_and_observer_create_topics() -> None:
    creating = {role for role in ROLES if any("Create" in right.operations for right in rights(role, "p."))}
    assert creating == {"learner", "observer"}


@pytest.fixture
def run(tmp_path: Path) -> str:
    path = tmp_path / "run.toml"
    path.write_text(
        'model.path = "m"\ntasks.environments = { lookup = 1.0 }\nlearner.versions = 3\nrun.id = "first"\n'
        'bus.kind = "kafka"\nbus.servers = "b:1"\n'
    )
    return str(path)


def test_the_command_takes_principals(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    command([run, "rollout=User:worker", "--run.id=second"])
    lines = capsys.readouterr().out.splitlines()
    assert sum("--allow-principal User:worker " in line for line in lines) == 7
    assert "--allow-principal User:learner --topic palimpsest.second.control --operation Read --operation Write" in (
        "\n".join(lines)
    )


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["worker=User:w"], "there is no role 'worker'"),
        (["rollout=w"], "a principal is TYPE:NAME"),
        (["rollout=User:a b"], "without spaces"),
        (["--bus.kind=sqlite"], "the log in a file"),
        (["--run.id="], "are empty"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(run: str, more: list[str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        command([run, *more])
