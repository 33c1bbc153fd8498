"""Storage in an S3 bucket (MinIO, Amazon's, or another with conditional writes), by the minio client.

The client blocks, so its calls run in threads. A body is one object: a small one is sent in one request, a large one in
parts of PART bytes, which become an object only after the last part arrived and the digest matches. The client signs or
sums every part (SHA-256 over http, MD5 over https), and the S3 refuses a part that does not match.

The store removes the parts of unfinished uploads when it opens, of any age: a prefix belongs to one store, and
an aborted upload of another process is sent again. MinIO lists unfinished uploads only by full name, so the store also
removes those of a name before the next upload to it.
"""

import asyncio
import errno
import os
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from io import BytesIO
from typing import BinaryIO, TypeVar, cast
from xml.etree import ElementTree as ET

from minio.error import MinioException, S3Error
from urllib3.exceptions import HTTPError

from palimpsest.common.config.schema import SnapshotStoreConfig
from palimpsest.common.logs import logger
from palimpsest.common.outages import OUTAGES, S3, Outages
from palimpsest.common.user_error import UserError
from palimpsest.services.snapshot_store import storage_errors
from palimpsest.services.snapshot_store.s3_client import NoCredentials, client, credentials
from palimpsest.services.snapshot_store.storage import Unavailable, parts
from palimpsest.services.snapshot_store.upload_reader import UploadReader

T = TypeVar("T")
SMALL = 8 << 20
"""A shorter body is sent in one request, from memory."""
PART = 32 << 20
"""Bytes of a part. An S3 allows 10,000 parts, so the largest body has 312 GiB. An upload holds four in memory."""
CHUNK = 1 << 20
THREADS = 64
CREATE_TRIES = 3
FULL = {"XMinioStorageFull": errno.ENOSPC, "XMinioAdminBucketQuotaExceeded": errno.EDQUOT}
CREATOR = "x-amz-meta-creator"
"""Header of an object that `create` stores, with an id of the call."""


class MinioStorage:
    """See storage.py. Call `open` first."""

    def __init__(self, config: SnapshotStoreConfig, *, prefix: str, outages: Outages = OUTAGES) -> None:
        self._config, self._prefix, self._bucket = config, prefix, config.bucket
        provider = credentials()
        self._client = client(config, provider, connections=THREADS, tries=2)
        self._once = client(config, provider, connections=THREADS, tries=1)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="s3")
        self._putting: Counter[str] = Counter()
        self._outage = outages.waiting()
        """The outage of the S3; the first call that succeeds ends it, and clients retry until then."""

    async def open(self) -> None:
        """Check that the bucket is usable, and create it if `create_bucket` is set. Raises UserError."""
        try:
            parts(self._prefix + "x")
        except ValueError:
            raise UserError(
                f"snapshot_store.prefix = {self._prefix!r} cannot begin an object's name: names with / between"
            ) from None
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._check_bucket)
        except S3Error as error:
            raise storage_errors.s3_error(self._config, error.code or "", error.message or "") from None
        except NoCredentials as error:
            raise storage_errors.without_credentials(str(error)) from None
        except (MinioException, HTTPError, ET.ParseError) as error:
            raise storage_errors.unreachable(self._config, f"{type(error).__name__}: {error}") from None

    async def put(self, key: str, chunks: AsyncIterator[bytes], *, digest: str | None = None) -> int:
        name = self._name(key)
        feed = UploadReader(chunks, digest)
        body = await feed.read_short(SMALL)
        if body is not None:
            await self._do(name, lambda: self._put(name, BytesIO(body), len(body)))
            return feed.size
        self._putting[name] += 1
        if self._putting[name] == 1:
            await self._do(name, lambda: self._abort_uploads(name))
        upload = asyncio.ensure_future(self._do(name, lambda: self._put(name, cast("BinaryIO", feed), -1)))
        try:
            await asyncio.shield(upload)
        except asyncio.CancelledError:
            feed.stop()
            with suppress(Exception):
                await upload  # removes the parts
            raise
        except Exception:
            if feed.failure is not None:
                self._outage.record_answer()
                raise feed.failure from None  # the sender failed or its digest differs; the S3 answered
            raise
        finally:
            self._putting[name] -= 1
        return feed.size

    async def create(self, key: str, body: bytes) -> bool:
        name = self._name(key)
        return await self._do(name, lambda: self._create(name, body))

    async def read(self, key: str) -> bytes | None:
        name = self._name(key)

        def read_all() -> bytes:
            reply = self._client.get_object(self._bucket, name)
            try:
                return reply.read()
            finally:
                reply.close()

        return await self._do(name, lambda: _or_none(read_all))

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        name = self._name(key)
        reply = await self._do(name, lambda: _or_none(lambda: self._client.get_object(self._bucket, name)))
        if reply is None:
            raise KeyError(key)
        try:
            while piece := await self._do(name, lambda: reply.read(CHUNK)):
                yield piece
        finally:
            reply.close()
            reply.release_conn()

    async def address(self, key: str) -> str | None:
        name = self._name(key)
        if not self._config.presign:
            return None
        holds = timedelta(seconds=self._config.presigned_s)
        return await self._do(name, lambda: self._client.presigned_get_object(self._bucket, name, holds))

    async def size(self, key: str) -> int | None:
        name = self._name(key)
        return await self._do(name, lambda: _or_none(lambda: self._client.stat_object(self._bucket, name).size))

    async def keys(self, prefix: str) -> list[str]:
        return sorted(key for key, _ in await self._list(prefix))

    async def older(self, prefix: str, age_s: float) -> list[str]:
        before = datetime.now(UTC) - timedelta(seconds=age_s)  # the S3 refuses clocks that differ by more than minutes
        return sorted(key for key, stored in await self._list(prefix) if stored < before)

    async def delete(self, key: str) -> None:
        name = self._name(key)
        await self._do(name, lambda: self._client.remove_object(self._bucket, name))

    def _name(self, key: str) -> str:
        return self._prefix + "/".join(parts(key))

    async def _list(self, prefix: str) -> list[tuple[str, datetime]]:
        name = self._prefix + prefix

        def listed() -> list[tuple[str, datetime]]:
            found = self._client.list_objects(self._bucket, name, recursive=True)
            return [
                (entry.object_name[len(self._prefix) :], entry.last_modified)
                for entry in found
                if entry.object_name and entry.last_modified
            ]

        return await self._do(name, listed)

    async def _do(self, name: str, call: Callable[[], T]) -> T:
        """Return the call's result from a thread. Converts the S3's errors to those of the port."""

        def run_call() -> T:
            began = time.time()
            try:
                found = call()
                self._outage.record_answer()
                return found
            except S3Error as error:
                if error.code in FULL:
                    self._outage.record_answer()
                    number = FULL[error.code]
                    raise OSError(number, os.strerror(number), f"{self._bucket}/{name}") from None
                raise self._unavailable(began, f"{error.code}: {error.message} ({name})") from error
            except (MinioException, HTTPError, ET.ParseError, NoCredentials) as error:
                raise self._unavailable(began, f"{type(error).__name__}: {error}") from error

        return await asyncio.get_running_loop().run_in_executor(self._threads, run_call)

    def _unavailable(self, began: float, problem: str) -> Unavailable:
        """Note an outage since `began` and return the error to raise."""
        endpoint = self._config.endpoint
        self._outage.record_failure(S3, endpoint, problem, since=began)
        return Unavailable(f"{endpoint}: {problem}", address=endpoint)

    def _put(self, name: str, body: BinaryIO, size: int) -> None:
        # One part at a time: the client's own threads would survive a failed upload.
        done = self._client.put_object(self._bucket, name, body, size, part_size=PART, num_parallel_uploads=1)
        if not done.etag:  # an S3 may answer 200 with an error in the body
            problem = f"{self._config.endpoint} did not assemble the parts of {name}"
            raise Unavailable(problem, address=self._config.endpoint)

    def _create(self, name: str, body: bytes) -> bool:
        creator = uuid.uuid4().hex
        for left in reversed(range(CREATE_TRIES)):
            try:
                # put_object drops If-None-Match; the method that it calls sends it
                headers: dict[str, str | list[str] | tuple[str]] = {
                    "Content-Type": "application/octet-stream",
                    CREATOR: creator,
                    "If-None-Match": "*",
                }
                self._once._put_object(self._bucket, name, body, headers)
                return True
            except S3Error as error:
                if error.code == "PreconditionFailed":
                    return self._creator(name) == creator  # an earlier attempt whose reply was lost
                if left == 0 or not (error.response.status >= 500 or error.code == "ConditionalRequestConflict"):
                    raise
            except HTTPError:
                if left == 0:
                    raise
        raise AssertionError

    def _creator(self, name: str) -> str | None:
        existing = _or_none(lambda: self._client.stat_object(self._bucket, name))
        return existing.metadata.get(CREATOR) if existing and existing.metadata else None

    def _check_bucket(self) -> None:
        try:
            self._abort_uploads(self._prefix)
            next(iter(self._client.list_objects(self._bucket, self._prefix)), None)
        except S3Error as error:
            if error.code != "NoSuchBucket" or not self._config.create_bucket:
                raise
            self._client.make_bucket(self._bucket, self._config.region)
        probe = f"{self._prefix}probes/{uuid.uuid4().hex}"
        won = [self._create(probe, b""), self._create(probe, b"")]
        self._client.remove_object(self._bucket, probe)
        if won != [True, False]:
            raise storage_errors.not_conditional(self._config)

    def _abort_uploads(self, name: str) -> None:
        """Remove the parts of unfinished uploads whose names begin with `name`."""
        try:
            while uploads := self._client._list_multipart_uploads(self._bucket, prefix=name).uploads:
                for upload in uploads:
                    with suppress(S3Error):  # finished or removed meanwhile
                        self._client._abort_multipart_upload(self._bucket, upload.object_name, upload.upload_id or "")
        except S3Error as error:
            if error.code not in ("NotImplemented", "AccessDenied"):
                raise
            logger().warning("cannot list parts of unfinished uploads", code=error.code, prefix=name)


def _or_none(call: Callable[[], T]) -> T | None:
    try:
        return call()
    except S3Error as error:
        if error.code == "NoSuchKey":
            return None
        raise
