"""Storage in a folder: keys are relative paths."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from palimpsest.common.files import sync_folder, with_filename
from palimpsest.services.snapshot_store.storage import DigestMismatch, parts

CHUNK = 1 << 20


class DiskStorage:
    """See storage.py. Removes partial files of earlier processes at the start.

    Without `tidy` it removes nothing, because another process may be using the folder.
    """

    def __init__(self, folder: Path, *, tidy: bool = True) -> None:
        self._folder = folder
        self._written = 0
        if tidy:
            folder.mkdir(parents=True, exist_ok=True)
            for partial in folder.rglob(".*.partial"):
                partial.unlink()

    async def put(self, key: str, chunks: AsyncIterator[bytes], *, digest: str | None = None) -> int:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._partial(path)
        hasher, size = blake3(), 0
        try:
            with with_filename(path), partial.open("wb") as file:
                async for chunk in chunks:
                    hasher.update(chunk)
                    size += len(chunk)
                    file.write(chunk)
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
            if digest is not None and hasher.hexdigest() != digest:
                raise DigestMismatch(
                    f"received {size} bytes with digest {hasher.hexdigest()}, but {digest} was announced"
                )
            partial.replace(path)
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)
        return size

    async def create(self, key: str, body: bytes) -> bool:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._partial(path)
        try:
            with with_filename(path), partial.open("wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(partial, path)  # fails if the name exists, unlike rename
            except FileExistsError:
                return False
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)
        return True

    async def read(self, key: str) -> bytes | None:
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            return None

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        try:
            file = self._path(key).open("rb")
        except FileNotFoundError:
            raise KeyError(key) from None
        with file:
            while chunk := file.read(CHUNK):
                yield chunk

    async def address(self, key: str) -> str | None:
        self._path(key)
        return None

    async def size(self, key: str) -> int | None:
        try:
            return self._path(key).stat().st_size
        except FileNotFoundError:
            return None

    async def keys(self, prefix: str) -> list[str]:
        return sorted(key for key, _ in self._files(prefix))

    async def older(self, prefix: str, age_s: float) -> list[str]:
        before, found = time.time() - age_s, []
        for key, path in self._files(prefix):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    found.append(key)
        return sorted(found)

    async def delete(self, key: str) -> None:
        path = self._path(key)
        if path.exists():
            path.unlink()
            sync_folder(path.parent)

    def _files(self, prefix: str) -> Iterator[tuple[str, Path]]:
        for path in (self._folder / prefix.rpartition("/")[0]).rglob("*"):
            key = str(path.relative_to(self._folder))
            if path.is_file() and not path.name.endswith(".partial") and key.startswith(prefix):
                yield key, path

    def _path(self, key: str) -> Path:
        return self._folder.joinpath(*parts(key))

    def _partial(self, path: Path) -> Path:
        self._written += 1  # two writers of one key must not share a partial file
        return path.with_name(f".{path.name}.{os.getpid()}.{self._written}.partial")
