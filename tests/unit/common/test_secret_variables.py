"""Which variables a process receives, and that its own secrets are not shown to others."""

import json
import os
import subprocess
import sys

import pytest

from palimpsest.common.secret_variables import SECRETS_OF, is_secret, of_environments, without_our_secrets

GIVEN = {
    "PATH": "/bin", "LC_ALL": "C.UTF-8", "https_proxy": "http://proxy:3128", "PYTHONPATH": "/src", "MINE": "1",
    "AWS_SECRET_ACCESS_KEY": "s", "MINIO_SECRET_KEY": "s", "PALIMPSEST_KAFKA_PASSWORD": "s",
    "PALIMPSEST_SERVICE_TOKEN": "s", "HF_TOKEN": "s", "PALIMPSEST_LEARNER__VERSIONS": "3",
}  # fmt: skip
USUAL = {"PATH", "LC_ALL", "https_proxy", "PYTHONPATH"}


def test_an_environment_receives_the_usual_and_the_named_variables_only() -> None:
    assert of_environments(GIVEN).keys() == USUAL
    assert of_environments(GIVEN, named=("MINE",)).keys() == USUAL | {"MINE"}


@pytest.mark.parametrize(
    ("service", "secrets"),
    [
        ("snapshot_store", {"AWS_SECRET_ACCESS_KEY", "MINIO_SECRET_KEY", "PALIMPSEST_SERVICE_TOKEN"}),
        ("env_gateway", {"PALIMPSEST_SERVICE_TOKEN"}),
        ("rollout", {"PALIMPSEST_KAFKA_PASSWORD", "PALIMPSEST_SERVICE_TOKEN"}),
        ("learner", {"PALIMPSEST_KAFKA_PASSWORD", "PALIMPSEST_SERVICE_TOKEN"}),
    ],
)
def test_a_service_receives_only_the_secrets_that_it_needs(service: str, secrets: set[str]) -> None:
    open_to_all = {*USUAL, "MINE", "HF_TOKEN", "PALIMPSEST_LEARNER__VERSIONS"}
    assert without_our_secrets(GIVEN, keep=SECRETS_OF[service]).keys() == open_to_all | secrets
    assert without_our_secrets(GIVEN).keys() == open_to_all


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True), ("OPENAI_API_KEY", True), ("PALIMPSEST_KAFKA_PASSWORD", True), ("aws_session_token", True),
        ("PALIMPSEST_SERVICE_TOKEN_FILE", False), ("PATH", False), ("KEYBOARD", False),
    ],
)  # fmt: skip
def test_secrets_are_recognized_by_name(name: str, secret: bool) -> None:
    assert is_secret(name) is secret


def test_a_process_hides_its_secrets_and_still_passes_them_on() -> None:
    code = """if True:
        import json, os, subprocess
        from pathlib import Path
        from palimpsest.common.secret_variables import hide_secrets
        hide_secrets()
        shown = dict(entry.split("=", 1) for entry in Path("/proc/self/environ").read_text().split("\\0") if entry)
        child = subprocess.run(["sh", "-c", "echo $MY_TOKEN"], capture_output=True, text=True).stdout.strip()
        print(json.dumps([shown["MY_TOKEN"], shown["OTHER"], os.environ["MY_TOKEN"], child]))
    """
    given = {**os.environ, "MY_TOKEN": "s3cret", "OTHER": "shown"}
    answer = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == ["******", "shown", "s3cret", "s3cret"]
