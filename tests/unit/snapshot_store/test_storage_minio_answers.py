"""Unexpected answers of an S3 service."""

import re
from collections.abc import Callable, Iterator

import pytest
from fastapi import FastAPI, Request, Response

from palimpsest.common.service import Server
from palimpsest.services.snapshot_store.storage import Unavailable
from palimpsest.services.snapshot_store.storage_minio import PART, MinioStorage
from tests.unit.snapshot_store.minio_storage import BUCKET, chunks, config

pytestmark = pytest.mark.servers

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
