"""Access to MinIO: credentials, permissions, bucket, endpoint, clock, region, and certificates."""

import json
import os
import re
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from minio import MinioAdmin, time as clock
from minio.credentials.providers import StaticProvider

from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.snapshot_store.storage_minio import PART, MinioStorage
from tests.servers.backends import s3_client
from tests.unit.snapshot_store.minio_storage import BUCKET, chunks, config, gone_after, unfinished
from tools.backends.minio import Minio

pytestmark = pytest.mark.servers


async def test_without_credentials_an_s3_is_refused(
    minio_server: Minio, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "MINIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:1/none")
    with pytest.raises(UserError, match=r"no credentials for the S3 were found .*: set AWS_ACCESS_KEY_ID and"):
        await MinioStorage(config(minio_server.endpoint), prefix="t/").open()


@pytest.mark.parametrize("source", ["AWS_", "MINIO_", "file"])
async def test_credentials_come_from_environment_or_file(
    minio_server: Minio, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, source: str
) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "MINIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    key, secret = minio_server.access_key, minio_server.secret_key
    if source == "file":
        (tmp_path / ".aws").mkdir()
        text = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
        (tmp_path / ".aws" / "credentials").write_text(text)
    else:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID" if source == "AWS_" else "MINIO_ACCESS_KEY", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY" if source == "AWS_" else "MINIO_SECRET_KEY", secret)
    await MinioStorage(config(minio_server.endpoint, create_bucket=True), prefix="t/").open()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("AWS_ACCESS_KEY_ID", "nobody", "refuses the credentials .InvalidAccessKeyId"),
        ("AWS_SECRET_ACCESS_KEY", "wrong-password", "refuses the credentials .SignatureDoesNotMatch"),
    ],
)
async def test_wrong_credentials_are_refused(
    minio_server: Minio, credentials: None, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as error:
        await MinioStorage(config(minio_server.endpoint), prefix="t/").open()
    assert error.value.code is ExitCode.CONFIGURATION
    assert minio_server.secret_key not in str(error.value)


def documented_policy() -> dict[str, Any]:
    """Return the policy of docs/operations.md for this bucket and any prefix that begins with t-."""
    text = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    found = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert found
    policy: dict[str, Any] = json.loads(found[1].replace("palimpsest/first/", f"{BUCKET}/t-").replace(
        "arn:aws:s3:::palimpsest", f"arn:aws:s3:::{BUCKET}"))  # fmt: skip
    return policy


def a_user(server: Minio, policy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Create a user with this policy; storages of the test use its credentials."""
    root = StaticProvider(server.access_key, server.secret_key)
    admin = MinioAdmin(endpoint=server.endpoint.removeprefix("http://"), credentials=root, secure=False)
    name = f"user-{uuid.uuid4().hex[:8]}"
    admin.user_add(name, "not-very-secret")
    admin.policy_add(name, policy=policy)
    admin.policy_set(name, user=name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", name)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-very-secret")


async def test_the_documented_actions_are_enough(
    storage: MinioStorage, minio_server: Minio, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_user(minio_server, documented_policy(), monkeypatch)
    allowed = MinioStorage(config(minio_server.endpoint), prefix=f"t-{uuid.uuid4().hex}/")
    await allowed.open()
    await allowed.put("objects/a", chunks(bytes(2 * PART)))
    assert await allowed.size("objects/a") == 2 * PART
    assert await allowed.size("objects/b") is None
    assert await allowed.create("versions/a", b"x")
    assert await allowed.read("versions/a") == b"x"
    assert [len(piece) async for piece in allowed.stream("versions/a")] == [1]
    assert await allowed.older("", 3600.0) == []
    with pytest.raises(ConnectionError):
        await allowed.put("objects/c", gone_after(bytes(2 * PART)))
    assert unfinished(allowed, "objects/c") == 0
    for key in await allowed.keys(""):
        await allowed.delete(key)
    assert await allowed.keys("") == []


@pytest.mark.parametrize("action", ["s3:ListBucket", "s3:PutObject", "s3:DeleteObject", "s3:GetObject"])
async def test_without_one_of_the_documented_actions_the_start_is_refused(
    storage: MinioStorage, minio_server: Minio, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    policy = documented_policy()
    for statement in policy["Statement"]:
        statement["Action"] = [allowed for allowed in statement["Action"] if allowed != action]
    a_user(minio_server, policy, monkeypatch)
    with pytest.raises(UserError, match=r"denies an action in bucket 'unit' .*docs/operations\.md"):
        await MinioStorage(config(minio_server.endpoint), prefix=f"t-{uuid.uuid4().hex}/").open()


async def test_a_missing_bucket_is_refused_or_created(minio_server: Minio, credentials: None) -> None:
    name = f"made-{uuid.uuid4().hex[:12]}"
    with pytest.raises(UserError, match=f"has no bucket '{name}' .*--snapshot_store.create_bucket=true"):
        await MinioStorage(config(minio_server.endpoint, bucket=name), prefix="t/").open()
    for _ in range(2):
        await MinioStorage(config(minio_server.endpoint, bucket=name, create_bucket=True), prefix="t/").open()
    assert s3_client(minio_server).bucket_exists(name)


async def test_an_endpoint_that_does_not_answer_is_refused(credentials: None) -> None:
    with pytest.raises(UserError, match=r"the S3 at http://127\.0\.0\.1:1 .* cannot be reached") as error:
        await MinioStorage(config("http://127.0.0.1:1"), prefix="t/").open()
    assert error.value.code is ExitCode.UNAVAILABLE


@pytest.mark.parametrize("endpoint", ["localhost:9000", "ftp://localhost", "http://localhost:9000/minio", "http://a:b"])
def test_an_invalid_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"snapshot_store.endpoint = {endpoint!r} cannot be used: ")):
        MinioStorage(config(endpoint), prefix="t/")


@pytest.mark.parametrize("prefix", ["/", "a//", "../", ".a/", "a/../b/"])
async def test_an_invalid_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"snapshot_store.prefix = {prefix!r} cannot begin")):
        await MinioStorage(config("http://127.0.0.1:1"), prefix=prefix).open()


async def test_a_clock_that_is_an_hour_off_is_refused(
    minio_server: Minio, credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = clock.utcnow
    monkeypatch.setattr(clock, "utcnow", lambda: real() + timedelta(hours=1))
    with pytest.raises(UserError, match="its clock and this machine's clock differ too much") as error:
        await MinioStorage(config(minio_server.endpoint), prefix="t/").open()
    assert error.value.code is ExitCode.UNAVAILABLE


async def test_a_region_other_than_the_buckets_is_refused(
    tmp_path: Any, credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIO_SITE_REGION", "eu-north-7")
    with Minio(tmp_path / "minio") as minio:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", minio.secret_key)
        with pytest.raises(UserError, match=r"is not in region 'us-east-1' \(snapshot_store.region\).*eu-north-7"):
            await MinioStorage(config(minio.endpoint, create_bucket=True), prefix="t/").open()
        await MinioStorage(config(minio.endpoint, create_bucket=True, region="eu-north-7"), prefix="t/").open()


async def test_a_certificate_of_an_unknown_authority_is_refused_and_its_file_is_enough(
    tmp_path: Any, credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Minio(tmp_path / "minio", tls=True) as minio:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", minio.secret_key)
        with pytest.raises(UserError, match=r"is not trusted: name the file .* with snapshot_store.ca_file"):
            await MinioStorage(config(minio.endpoint), prefix="t/").open()
        with pytest.raises(UserError, match="the S3 at http://"):  # an http endpoint
            await MinioStorage(config(minio.endpoint.replace("https", "http")), prefix="t/").open()
        trusted = config(minio.endpoint, ca_file=minio.ca_file, create_bucket=True)
        storage = MinioStorage(trusted, prefix="t/")
        await storage.open()
        await storage.put("a", chunks(bytes(2 * PART)))
        assert await storage.size("a") == 2 * PART


@pytest.mark.parametrize("text", [None, "no certificate"])
def test_a_ca_file_without_certificates_is_refused(tmp_path: Any, text: str | None) -> None:
    path = tmp_path / "ca.pem"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"snapshot_store.ca_file = '.*ca.pem' holds no usable certificates"):
        MinioStorage(config("https://127.0.0.1:1", ca_file=path), prefix="t/")
