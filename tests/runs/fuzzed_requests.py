"""Schemathesis sends requests to every service of a run, with tokens that may not end or alter the run.

A role that may not send a request gets 403 for it. The few requests with which a role could lawfully end or alter the
run are not sent; `tests/contract` sends them to the same services without a run.
"""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx

from palimpsest.common.control.access import SERVICE_TOKEN, TOKENS_FILE, Role, token_line
from palimpsest.control_client import url_in
from tests.processes.waiting import LIMIT_S
from tests.runs.run_process import RunProcess, wait_for

CONFIG = Path(__file__).parents[1] / "contract" / "schemathesis.toml"
OWN_NAMES = """
# Names that no process of the run has: a request takes or frees no lease and no name of the run.
[[operations]]
include-name = ["PUT /v1/leases/{holder}", "DELETE /v1/leases/{holder}"]
parameters = { "path.holder" = "schemathesis" }

[[operations]]
include-name = ["PUT /v1/members/{role}/{name}", "DELETE /v1/members/{role}/{name}"]
parameters = { "path.name" = "schemathesis" }
checks.positive_data_acceptance.expected-statuses = ["2xx", 409]
"""
EXAMPLES = 3
"""Generated requests of an operation, and sequences of linked requests, at most."""
PHASES = "fuzzing,stateful"
"""Without `coverage`, which sends most of the requests and depends on the document alone: tests/contract has it."""


@dataclass(frozen=True, slots=True)
class Requests:
    """What is sent to one service."""

    service: str
    role: Role
    """Of the token."""
    forbidden: frozenset[str] = frozenset()
    """Operations to which every reply is 403."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Operation that is not sent -> what this role could do to the run with it."""


DRAIN, SETTINGS = frozenset({"POST /v1/actions/drain"}), frozenset({"PATCH /v1/settings"})
COMMIT = "/v1/checkpoints/{version}/{writer}"
ALL = (
    Requests(
        "learner",
        Role.OPERATE,
        forbidden=SETTINGS,
        left_out={"POST /v1/actions/stop": "end it", "POST /v1/actions/pause": "hold it until a person resumes it"},
    ),
    Requests("worker-0", Role.VIEW, forbidden=DRAIN),
    Requests("replica-0", Role.VIEW),
    Requests("env_gateway", Role.SERVICE, forbidden=DRAIN | SETTINGS),
    Requests(
        "snapshot_store",
        Role.SERVICE,
        forbidden=SETTINGS,
        left_out={
            "POST /v1/writers": "replace its learner",
            f"PUT {COMMIT}": "accept a checkpoint in the name of its learner, whose number is small",
            f"DELETE {COMMIT}": "withdraw a checkpoint, likewise",
        },
    ),
)


def tokens(folder: Path) -> dict[str, str]:
    """Write a tokens file in which the token of a role is its name. Returns the environment variables of the run."""
    file = folder / "tokens"
    file.write_text("\n".join(token_line(role, role, role) for role in Role))
    return {TOKENS_FILE: str(file), SERVICE_TOKEN: Role.SERVICE}


def fuzz(run: RunProcess, home: Path, folder: Path) -> None:
    """Send requests to the services of the run, one service after the other. `folder`: for reports.

    Asserts that no reply is a 5xx, that each is one that the service's document permits, and that no forbidden
    operation is carried out.
    """
    config = folder / "schemathesis.toml"
    config.write_text(CONFIG.read_text() + OWN_NAMES)
    for sent in ALL:
        ready = partial(_is_ready, url_in(home, sent.service))
        wait_for(ready, run, name=f"{sent.service} is ready")  # before, /readyz replies 503
        replies = _statuses(sent, url_in(home, sent.service), config)
        assert {operation for operation, statuses in replies.items() if statuses <= {401, 403}} == sent.forbidden, sent
        assert not sent.left_out.keys() & replies.keys()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:  # it does not listen yet
        return False


def _statuses(sent: Requests, url: str, config: Path) -> dict[str, set[int]]:
    """Send the requests. Returns operation -> statuses of the replies in the fuzzing phase."""
    events = config.with_name(f"{sent.service}.ndjson")
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", config, "run", f"{url}/openapi.json"),
            *("--header", f"Authorization: Bearer {sent.role}", "--request-timeout", str(LIMIT_S)),
            *("--phases", PHASES, "--max-examples", str(EXAMPLES), "--report-ndjson-path", events),
            "--suppress-health-check=too_slow",  # a limit on seconds, which a busy machine exceeds
            *(flag for operation in sent.left_out for flag in ("--exclude-name", operation)),
        ],
        capture_output=True,
        text=True,
        cwd=config.parent,
        check=False,
    )
    assert ran.returncode == 0, f"{sent}\n{ran.stdout}{ran.stderr}"
    statuses: dict[str, set[int]] = defaultdict(set)
    for line in events.read_text().splitlines():
        finished = json.loads(line).get("ScenarioFinished", {})
        if finished.get("phase") == "fuzzing":
            recorder = finished["recorder"]
            for exchange in recorder.get("interactions", {}).values():
                statuses[recorder["label"]].add(exchange["response"]["status_code"])
    return statuses
