"""The MinIO storage: conditions that its safety needs, and unexpected answers of an S3 service."""

import asyncio
import itertools
import json
import os
import re
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from fastapi import FastAPI, Request, Response
from minio import MinioAdmin, time as clock
from minio.credentials.providers import StaticProvider
from urllib3.exceptions import ProtocolError

from palimpsest.common.config.schema import SnapshotStoreConfig
from palimpsest.common.service import Server
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.services.snapshot_store import upload_reader
from palimpsest.services.snapshot_store.storage import DigestMismatch, Unavailable
from palimpsest.services.snapshot_store.storage_minio import PART, SMALL, MinioStorage
from tests.servers.backends import s3_client
from tests.servers.stores import LIMIT_S
from tools.backends.minio import Minio

pytestmark = pytest.mark.servers

BUCKET = "unit"


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def config(endpoint: str, **more: Any) -> SnapshotStoreConfig:
    return SnapshotStoreConfig(**{"storage": "s3", "endpoint": endpoint, "bucket": BUCKET, **more})


@pytest.fixture
def credentials(minio_server: Minio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", minio_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", minio_server.secret_key)


@pytest.fixture
async def storage(minio_server: Minio, credentials: None) -> MinioStorage:
    made = MinioStorage(config(minio_server.endpoint, create_bucket=True), prefix=f"{uuid.uuid4().hex}/")
    await made.open()
    return made


@pytest.mark.parametrize("size", [10, SMALL + PART])
async def test_without_the_digest_check_wrong_bytes_would_be_stored(
    storage: MinioStorage, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    announced, wrong = blake3(b"right").hexdigest(), b"x" * size
    with pytest.raises(DigestMismatch):
        await storage.put("a", chunks(wrong), digest=announced)
    assert await storage.size("a") is None

    class Blind:
        def update(self, _chunk: bytes) -> None: ...

        def hexdigest(self) -> str:
            return announced

    monkeypatch.setattr(upload_reader, "blake3", Blind)
    await storage.put("a", chunks(wrong), digest=announced)
    assert await storage.size("a") == size


def without_the_condition(storage: MinioStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    real = storage._once._put_object

    def plain(bucket: str, name: str, body: bytes, headers: dict[str, Any]) -> object:
        del headers["If-None-Match"]
        return real(bucket, name, body, headers)

    monkeypatch.setattr(storage._once, "_put_object", plain)


async def test_without_the_condition_a_second_create_would_succeed(
    storage: MinioStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_the_condition(storage, monkeypatch)
    assert [await storage.create("a", b"first"), await storage.create("a", b"second")] == [True, True]
    assert await storage.read("a") == b"second"


async def test_an_s3_that_ignores_the_condition_is_refused_at_the_start(
    storage: MinioStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_the_condition(storage, monkeypatch)
    with pytest.raises(UserError, match="ignores If-None-Match"):
        await storage.open()
    assert await storage.keys("") == []


def losing_replies(storage: MinioStorage, monkeypatch: pytest.MonkeyPatch, replies: int, *, land: bool) -> None:
    """Lose the answers to the first requests of `create`; with `land`, the first request takes effect."""
    real, count = storage._once._put_object, itertools.count()

    def lossy(*arguments: Any) -> object:
        number = next(count)
        if number < replies:
            if land and number == 0:
                real(*arguments)
            raise ProtocolError("Connection aborted.")
        return real(*arguments)

    monkeypatch.setattr(storage._once, "_put_object", lossy)


@pytest.mark.parametrize("land", [True, False])
async def test_a_create_with_a_lost_reply_detects_its_success(
    storage: MinioStorage, monkeypatch: pytest.MonkeyPatch, land: bool
) -> None:
    losing_replies(storage, monkeypatch, 1, land=land)
    assert await storage.create("a", b"body")
    assert await storage.read("a") == b"body"


async def test_a_create_with_a_lost_reply_is_distinct_from_another_of_the_same_bytes(
    storage: MinioStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    another = MinioStorage(storage._config, prefix=storage._prefix)
    assert await another.create("a", b"body")
    losing_replies(storage, monkeypatch, 1, land=False)
    assert not await storage.create("a", b"body")


async def test_a_create_without_any_answer_is_unavailable_and_may_have_succeeded(
    storage: MinioStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing_replies(storage, monkeypatch, 3, land=True)
    with pytest.raises(Unavailable, match=r"ProtocolError: Connection aborted\."):
        await storage.create("a", b"body")
    assert not await storage.create("a", b"body")
    assert await storage.read("a") == b"body"


def unfinished(storage: MinioStorage, key: str) -> int:
    listed = storage._client._list_multipart_uploads(BUCKET, prefix=f"{storage._prefix}{key}")
    return len(listed.uploads)


async def test_an_upload_that_fails_leaves_no_parts(storage: MinioStorage) -> None:
    seen = []

    async def failing() -> AsyncIterator[bytes]:
        yield bytes(2 * PART)
        seen.append(unfinished(storage, "a"))
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await storage.put("a", failing())
    assert (seen, unfinished(storage, "a")) == ([1], 0)


async def test_parts_of_a_killed_store_are_removed_by_the_next_upload(storage: MinioStorage) -> None:
    name = f"{storage._prefix}a"
    upload = storage._client._create_multipart_upload(BUCKET, name, {})
    storage._client._upload_part(BUCKET, name, bytes(SMALL), None, upload, 1)
    assert unfinished(storage, "a") == 1
    await storage.put("a", chunks(bytes(2 * PART)))
    assert unfinished(storage, "a") == 0


async def test_the_event_loop_runs_during_s3_requests(storage: MinioStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, ours, waited = asyncio.get_running_loop(), threading.get_ident(), set[str]()

    def watch(name: str) -> None:
        real = getattr(storage._client, name)

        def call(*arguments: Any, **more: Any) -> object:
            assert threading.get_ident() != ours, f"{name} holds the loop up"
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(
                LIMIT_S
            )  # the event loop runs during the call
            waited.add(name)
            return real(*arguments, **more)

        monkeypatch.setattr(storage._client, name, call)

    calls = ("put_object", "get_object", "stat_object", "remove_object")
    for name in calls:
        watch(name)
    await storage.put("a", chunks(*[bytes(1 << 20)] * 30))
    assert await storage.size("a") == 30 << 20
    assert sum([len(piece) async for piece in storage.stream("a")]) == 30 << 20
    await storage.delete("a")
    assert waited == set(calls)


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
    ("name", "value", "said"),
    [
        ("AWS_ACCESS_KEY_ID", "nobody", "refuses the credentials .InvalidAccessKeyId"),
        ("AWS_SECRET_ACCESS_KEY", "wrong-password", "refuses the credentials .SignatureDoesNotMatch"),
    ],
)
async def test_wrong_credentials_are_refused(
    minio_server: Minio, credentials: None, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said) as refused:
        await MinioStorage(config(minio_server.endpoint), prefix="t/").open()
    assert refused.value.code is ExitCode.CONFIGURATION
    assert minio_server.secret_key not in str(refused.value)


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


async def gone_after(piece: bytes) -> AsyncIterator[bytes]:
    yield piece
    raise ConnectionError


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
    with pytest.raises(UserError, match=r"the S3 at http://127\.0\.0\.1:1 .* cannot be reached") as refused:
        await MinioStorage(config("http://127.0.0.1:1"), prefix="t/").open()
    assert refused.value.code is ExitCode.UNAVAILABLE


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
    with pytest.raises(UserError, match="its clock and this machine's clock differ too much") as refused:
        await MinioStorage(config(minio_server.endpoint), prefix="t/").open()
    assert refused.value.code is ExitCode.UNAVAILABLE


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


XML = "<?xml version='1.0' encoding='UTF-8'?>"
Answer = tuple[int, str, str] | tuple[int, str, str, dict[str, str]]
NOTHING: Answer = (200, "application/xml", f"{XML}<ListResult><Name>unit</Name></ListResult>")


@pytest.fixture
def answering(credentials: None) -> Iterator[Callable[..., MinioStorage]]:
    """A storage over an S3 stand-in with given answers per method and query; other requests get an empty list."""
    servers: list[Server] = []

    def make(**answers: Answer) -> MinioStorage:
        app = FastAPI()

        @app.api_route("/{path:path}", methods=["GET", "HEAD", "PUT", "POST", "DELETE"])
        async def answer(request: Request, path: str) -> Response:
            await request.body()
            kind = "_".join([request.method, *sorted({"uploads", "uploadId"} & set(request.query_params))])
            code, media_type, body, *headers = answers.get(kind, NOTHING)
            return Response(body, code, {"ETag": '"0"', "Content-Type": media_type, **(headers or [{}])[0]})

        servers.append(Server(app, "127.0.0.1", 0, key="s3"))
        servers[-1].__enter__()
        return MinioStorage(config(f"http://127.0.0.1:{servers[-1].port}"), prefix="t/")

    yield make
    for server in servers:
        server.__exit__(None, None, None)


def error(code: str) -> str:
    return f"{XML}<Error><Code>{code}</Code><Message>it is so</Message></Error>"


def refusing(status: int, code: str) -> Answer:
    return status, "application/xml", error(code)


@pytest.mark.parametrize(("code", "number"), [("XMinioStorageFull", 28), ("XMinioAdminBucketQuotaExceeded", 122)])
async def test_a_full_s3_is_a_full_disk(answering: Callable[..., MinioStorage], code: str, number: int) -> None:
    storage = answering(PUT=refusing(507, code))
    for write in (storage.put("a", chunks(b"x")), storage.create("a", b"x")):
        with pytest.raises(OSError, match=re.escape(f"'{BUCKET}/t/a'")) as full:
            await write
        assert full.value.errno == number


async def test_parts_that_could_not_be_joined_are_no_object(answering: Callable[..., MinioStorage]) -> None:
    """The status is 200, sent before the error occurred; the body has the error."""
    begun = f"{XML}<Begun><UploadId>1</UploadId></Begun>"
    storage = answering(
        POST_uploads=(200, "application/xml", begun), POST_uploadId=(200, "application/xml", error("InternalError"))
    )
    with pytest.raises(Unavailable, match="did not assemble the parts of t/a"):
        await storage.put("a", chunks(bytes(2 * PART)))


@pytest.mark.parametrize(
    "answer",
    [
        refusing(503, "SlowDown"), refusing(500, "InternalError"), refusing(403, "AccessDenied"),
        refusing(404, "NoSuchBucket"), (502, "text/html", "<html>Bad Gateway</html>"),
        (200, "text/html", "<p>Log in<br></p>"), (503, "text/plain", ""),
    ],
)  # fmt: skip
async def test_an_s3_with_unexpected_answers_is_unavailable(
    answering: Callable[..., MinioStorage], answer: Answer
) -> None:
    storage = answering(GET=answer)
    with pytest.raises(Unavailable, match=r"^http://127\.0\.0\.1:\d+: "):
        await storage.keys("")


async def test_a_broken_download_is_unavailable_and_not_a_short_body(answering: Callable[..., MinioStorage]) -> None:
    storage = answering(GET=(200, "application/octet-stream", "only this", {"Content-Length": "1000"}))
    for read in (storage.read("a"), anext(storage.stream("a"))):
        with pytest.raises(Unavailable, match="IncompleteRead"):
            await read
