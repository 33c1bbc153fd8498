"""Every service answers as its OpenAPI document says; schemathesis sends requests that it permits and that it forbids.

By hand, with more requests: make test ARGS=tests/contract/test_openapi.py
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from palimpsest.common.control.access import METRICS_TOKEN, OPEN, SERVICE_TOKEN
from palimpsest.common.control.credentials import open_access
from palimpsest.common.control.error_replies import COMMON_ERRORS
from palimpsest.common.service import Server
from tests.contract.http_services import APPS

CONFIG = Path(__file__).with_name("schemathesis.toml")


@pytest.mark.thorough
@pytest.mark.parametrize("examples", [3, pytest.param(500, marks=pytest.mark.long)])
@pytest.mark.parametrize("service", ["gateway", "store", "learner"])  # the workers' and replicas' are the learner's
def test_no_request_is_answered_outside_the_document(service: str, examples: int, tmp_path: Path) -> None:
    tokens = {} if service == "learner" else {SERVICE_TOKEN: "secret"}  # no token has all the roles of the learner
    app = APPS[service](open_access(tokens), tmp_path)
    with Server(app, "127.0.0.1", 0, key=service) as server:
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "--config-file", CONFIG),
                *("run", f"http://127.0.0.1:{server.port}/openapi.json"),
                *("--header", "Authorization: Bearer secret", "--max-examples", str(examples)),
                *("--exclude-path", "/v1/actions/drain"),  # a gateway that drains begins no session
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("service", APPS)
def test_every_route_declares_its_errors_and_its_roles(service: str, tmp_path: Path) -> None:
    document = APPS[service](open_access({SERVICE_TOKEN: "secret", METRICS_TOKEN: "scrape"}), tmp_path).openapi()
    schemas = document["components"]["schemas"]
    assert {name for name in references(document) if name not in schemas} == set()
    shape = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            errors = {int(status): reply for status, reply in operation["responses"].items() if int(status) >= 400}
            if path == "/readyz":
                del errors[503]  # has the reason
            else:
                assert set(COMMON_ERRORS) <= set(errors)
            assert all(reply["content"] == shape for reply in errors.values())
            assert ("security" in operation) is (path not in OPEN)


def test_the_roles_of_a_route_are_in_the_document(tmp_path: Path) -> None:
    paths = APPS["gateway"](open_access({SERVICE_TOKEN: "secret"}), tmp_path).openapi()["paths"]
    assert paths["/v1/sessions"]["post"]["security"] == [{"bearer": ["service"]}]
    assert paths["/v1/sessions/{session_id}"]["delete"]["security"] == [
        {"bearer": ["service"]},
        {"bearer": ["operate"]},
    ]
    assert paths["/v1/envs/{name}"]["get"]["security"] == [{"bearer": ["view"]}]
    assert "security" not in APPS["gateway"](open_access({}), tmp_path).openapi()["paths"]["/v1/sessions"]["post"]


def references(node: object) -> Iterator[str]:
    """Yield the name of every schema that the document refers to."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].removeprefix("#/components/schemas/")
        for child in node.values():
            yield from references(child)
    elif isinstance(node, list):
        for child in node:
            yield from references(child)
