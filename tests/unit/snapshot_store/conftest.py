"""A MinIO storage over a real server."""

import uuid

import pytest

from palimpsest.services.snapshot_store.storage_minio import MinioStorage
from tests.unit.snapshot_store.minio_storage import config
from tools.backends.minio import Minio


@pytest.fixture
def credentials(minio_server: Minio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", minio_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", minio_server.secret_key)


@pytest.fixture
async def storage(minio_server: Minio, credentials: None) -> MinioStorage:
    made = MinioStorage(config(minio_server.endpoint, create_bucket=True), prefix=f"{uuid.uuid4().hex}/")
    await made.open()
    return made
