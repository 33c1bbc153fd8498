"""Read-only access to the stored versions of a run, without the service of the store."""

import asyncio
import re
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from palimpsest.common.config.schema import RunConfig
from palimpsest.common.snapshots.frames import Hashed, RawTensor, decode_tensors, joined
from palimpsest.common.snapshots.manifest import Damaged, Manifest, unseal
from palimpsest.common.snapshots.raw_file import RawFile
from palimpsest.common.snapshots.walker import Walker
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.common.versions import Version
from palimpsest.services.snapshot_store.offline import open_offline
from palimpsest.services.snapshot_store.pins import KEY, Pins
from palimpsest.services.snapshot_store.storage import Unavailable

_MANIFEST = re.compile(r"versions/(\d+)\.json")
NEAREST = 12
"""Maximum number of versions in an error message."""
RESTORE = "restore the store from a copy (`palimpsest store import`), or use another version"


class NotStored(UserError):
    """The store does not hold this version."""

    def __init__(self, version: int, message: str) -> None:
        super().__init__(message)
        self.version = version


class StoredVersions:
    """The versions of a run. Every method raises UserError if the store does not answer or is damaged."""

    def __init__(self, config: RunConfig) -> None:
        self._run, self._place = config.run.id, _place(config)
        self._runner = asyncio.Runner()
        try:
            with self.user_errors():
                self._storage = self._runner.run(open_offline(config))
        except BaseException:
            self._runner.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.close()

    def numbers(self) -> list[int]:
        """Return all versions in the store, ascending."""
        with self.user_errors():
            keys = self._runner.run(self._storage.keys("versions/"))
        return sorted(int(match[1]) for key in keys if (match := _MANIFEST.fullmatch(key)))

    def manifest(self, version: int | None) -> Manifest:
        """Return the manifest of a version (None: the newest). Raises NotStored."""
        there = self.numbers()
        if not there:
            raise UserError(f"run {self._run} has published no version: {self._place} has none")
        number = there[-1] if version is None else version
        key = f"versions/{number:08d}.json"
        with self.user_errors():
            body = self._runner.run(self._storage.read(key)) if number in there else None
        if body is None:
            raise NotStored(
                number,
                f"version {number} of run {self._run} is not in {self._place}. {_listed(there)}; a run keeps older "
                f"ones with learner.checkpoint.keep",
            )
        with self.user_errors(f"version {number} ({key})"):
            manifest = unseal(body)
            if manifest.version != number:
                raise Damaged(f"its manifest names version {manifest.version}")
        self.refuse_other_run(manifest)
        return manifest

    def tensors(self, manifest: Manifest) -> Iterator[RawTensor]:
        """Iterate over the tensors of a version. Checks the digests of the objects and of each tensor.

        Builds a version that is stored as a delta in a temporary file.
        """
        with self.user_errors(f"object {manifest.object}"), tempfile.TemporaryDirectory() as folder:
            if manifest.parent is None:
                with self.object(manifest) as chunks:
                    yield from decode_tensors(chunks, manifest)
                return
            raw = RawFile(Path(folder) / "weights.raw")
            with self.whole_chain(manifest.version):
                Walker(self, raw).move(manifest.version)
            yield from raw.tensors(manifest)

    @contextmanager
    def whole_chain(self, version: int) -> Iterator[None]:
        """Raise UserError about damage if the block misses a version on which this one depends."""
        try:
            yield
        except NotStored as missing:
            if missing.version == version:
                raise
            raise UserError(
                f"version {version} is stored as a delta that needs version {missing.version}, which is not in "
                f"{self._place}: {RESTORE}",
                ExitCode.DAMAGED,
            ) from None

    @contextmanager
    def object(self, manifest: Manifest) -> Iterator[Iterator[bytes]]:
        """See VersionSource (common/snapshots/walker.py). Compares the digest at the end of the block."""
        hashed = Hashed(self._chunks(manifest), manifest)
        yield hashed.chunks()
        hashed.verify()

    def _object(self, digest: str) -> Iterator[bytes]:
        stream = self._storage.stream(f"objects/{digest}")
        while chunk := self._runner.run(_next(stream)):
            yield chunk

    def _chunks(self, manifest: Manifest) -> Iterator[bytes]:
        try:
            yield from joined(manifest, self._object)
        except KeyError:
            gone = manifest.version not in self.numbers()
            if gone:
                raise UserError(
                    f"version {manifest.version} of run {self._run} was removed from {self._place} during the export, "
                    f"because the running run released it: export the newest version"
                ) from None
            raise Damaged(f"version {manifest.version}: its weights are not in the store") from None

    def sealed(self, version: int) -> bytes:
        """Return the sealed manifest of a version that is there, as stored."""
        with self.user_errors():
            body = self._runner.run(self._storage.read(f"versions/{version:08d}.json"))
        if body is None:
            raise UserError(f"version {version} was removed from {self._place} meanwhile")
        return body

    def pins(self) -> dict[Version, dict[str, float | None]]:
        """Return the pins that hold now; see Pins."""
        pins = Pins(self._storage)
        with self.user_errors(KEY):
            self._runner.run(pins.open())
        return pins.all()

    def refuse_other_run(self, manifest: Manifest) -> None:
        """Raise UserError for a version of another run."""
        if manifest.run != self._run:
            raise UserError(
                f"version {manifest.version} in {self._place} belongs to run {manifest.run}, not {self._run}: name "
                f"that run"
            )

    def add(self, manifest: Manifest, sealed: bytes, bodies: Mapping[str, bytes]) -> None:
        """Store a version: its objects first. The store's service sees it at its next start. bodies: by digest."""
        with self.user_errors():
            for each in manifest.objects:
                self._put_object(each.digest, bodies[each.digest])
            self._runner.run(self._storage.create(f"versions/{manifest.version:08d}.json", sealed))

    def replace(self, manifest: Manifest, sealed: bytes, bodies: Mapping[str, bytes]) -> None:
        """Store a version in place of one whose manifest is damaged: its objects first. bodies: by digest."""
        with self.user_errors():
            for each in manifest.objects:
                self._put_object(each.digest, bodies[each.digest])
            self._put(f"versions/{manifest.version:08d}.json", sealed)

    def children(self, version: int) -> dict[int, str]:
        """Return the readable versions that are deltas to this one -> its digest, as they name it."""
        found = {}
        for number in self.numbers():
            with suppress(UserError):
                parent = self.manifest(number).parent
                if parent is not None and parent.version == version:
                    found[number] = parent.digest
        return found

    def restore(self, manifest: Manifest, bodies: Mapping[str, bytes]) -> bool:
        """Store again the objects of a stored version that are missing or damaged. Return whether there was one.

        bodies: by digest; objects without a body stay as they are.
        """
        restored = False
        with self.user_errors():
            for digest in {each.digest for each in manifest.objects} & bodies.keys():
                if self._runner.run(self._storage.read(f"objects/{digest}")) != bodies[digest]:
                    self._put_object(digest, bodies[digest])
                    restored = True
        return restored

    def _put_object(self, digest: str, body: bytes) -> None:
        self._put(f"objects/{digest}", body, digest=digest)

    def _put(self, key: str, body: bytes, *, digest: str | None = None) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            yield body

        self._runner.run(self._storage.put(key, chunks(), digest=digest))

    @contextmanager
    def user_errors(self, what: str = "") -> Iterator[None]:
        """Raise UserError for the errors of the storage in the block. what: the subject of a message about damage."""
        try:
            yield
        except Unavailable as error:
            raise UserError(f"the storage of the versions cannot be read: {error}", ExitCode.UNAVAILABLE) from None
        except Damaged as damage:
            raise UserError(f"{what}, in {self._place}: {damage}: {RESTORE}", ExitCode.DAMAGED) from None


async def _next(stream: AsyncIterator[bytes]) -> bytes:
    return await anext(stream, b"")


def _place(config: RunConfig) -> str:
    store = config.snapshot_store
    if store.storage == "folder":
        return str(config.snapshot_folder)
    return f"{store.endpoint}, {store.bucket}/{config.object_prefix}"


def _listed(there: list[int]) -> str:
    """Return a sentence that lists the versions.

    >>> _listed([3, 4, 5]), _listed([7])
    ('There are 3, 4, 5', 'There is 7')
    >>> _listed(list(range(100)))
    'There are 100 from 0 to 99, the newest of them 88, 89, 90, 91, 92, 93, 94, 95, 96, 97, 98, 99'
    """
    newest = ", ".join(map(str, there[-NEAREST:]))
    if len(there) > NEAREST:
        return f"There are {len(there)} from {there[0]} to {there[-1]}, the newest of them {newest}"
    return f"There {'is' if len(there) == 1 else 'are'} {newest}"
