"""Move a copy of the weights in place from version to version, along the deltas in the store.

The guards: every object is compared with its digest before it is applied; a delta is applied only to the version that
its manifest names, by number and digest; after the last hop every tensor is compared with its digest in the manifest of
the version. A copy that fails is loaded again from the base of its chain, once.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from palimpsest.common.logs import logger
from palimpsest.common.snapshots.chain import Leg, from_base, way
from palimpsest.common.snapshots.client import VersionMissing
from palimpsest.common.snapshots.codec import Bytes
from palimpsest.common.snapshots.frames import THREADS, Held, RawTensor, decode_tensors, patch
from palimpsest.common.snapshots.manifest import Damaged, Manifest, TensorEntry
from palimpsest.common.versions import Version

MANIFESTS = 64
"""Manifests that a walker keeps."""


class VersionSource(Protocol):
    """Where the versions are. SnapshotClient is one."""

    def manifest(self, version: Version) -> Manifest:
        """Return the manifest of a version. Raises VersionMissing, Damaged."""

    def object(self, manifest: Manifest) -> AbstractContextManager[Iterator[bytes]]:
        """Open the verified bytes of a version's object. Raises VersionMissing, Damaged."""


class WeightsCopy(Protocol):
    """A copy of the weights."""

    def load(self, tensors: Iterator[RawTensor], manifest: Manifest) -> None:
        """Overwrite all tensors. Raises ValueError if they are of another model."""

    def editing(self, entry: TensorEntry) -> AbstractContextManager[Bytes]:
        """Open a tensor for changes; see frames.Editing. Raises ValueError if it is of another model.

        Several threads may have different tensors open.
        """


@dataclass(frozen=True, slots=True)
class Moved:
    """What a move took."""

    hops: int
    bytes: int
    """Of the objects that were applied."""


class Walker:
    """A copy and the version that it holds."""

    def __init__(self, store: VersionSource, resident: WeightsCopy, *, held: Held | None = None) -> None:
        """held: the numbers that the copy holds, if it is a part of the weights. Nothing here can verify the tensors
        then: the owner of all parts has to."""
        self._store, self._resident, self._held = store, resident, held
        self._manifests: OrderedDict[Version, Manifest] = OrderedDict()
        self.manifest: Manifest | None = None
        """Manifest of the version that the copy holds; None before the first move, and while the copy holds none."""

    def move(self, version: Version) -> Moved:
        """Move the copy to a version. Raises VersionMissing, Damaged, ValueError if it is of another model."""
        held = self.manifest
        if held is not None and held.version == version:
            return Moved(0, 0)
        try:
            return self._walk(way(held.version if held else None, version, self._manifest))
        except (Damaged, VersionMissing) as error:
            if held is None:
                raise
            logger().warning("loading from the base of its chain", version=version, reason=str(error))
        self._manifests.clear()  # the store may have replaced a delta by a base
        return self._walk(from_base(version, self._manifest))

    def forget(self) -> None:
        """Take the copy as holding no version; the next move loads a base."""
        self.manifest = None

    def _manifest(self, version: Version) -> Manifest:
        if self.manifest is not None and self.manifest.version == version:
            return self.manifest
        if version not in self._manifests:
            self._manifests[version] = self._store.manifest(version)
            while len(self._manifests) > MANIFESTS:
                self._manifests.popitem(last=False)
        self._manifests.move_to_end(version)
        return self._manifests[version]

    def _walk(self, hops: list[Leg]) -> Moved:
        held, self.manifest = self.manifest, None  # during the walk the copy is of no version
        moved = 0
        with ThreadPoolExecutor(THREADS, thread_name_prefix="walk") as pool:
            for hop in hops:
                _check_parents(hop, held, self._manifest)
                with self._store.object(hop.manifest) as chunks:
                    arrived = self._arrived(hop)
                    if hop.loads:
                        self._resident.load(decode_tensors(chunks, hop.manifest), hop.manifest)
                    else:
                        last = arrived if hop is hops[-1] and self._held is None else None  # a digest is of a whole one
                        patch(
                            chunks, hop.manifest, self._resident.editing, pool,
                            back=hop.back, held=self._held, arriving=last,
                        )  # fmt: skip
                held = arrived
                moved += hop.manifest.object_size
        assert held is not None
        self.manifest = held
        return Moved(len(hops), moved)

    def _arrived(self, hop: Leg) -> Manifest:
        if not hop.back:
            return hop.manifest
        assert hop.manifest.parent is not None
        return self._manifest(hop.manifest.parent.version)


def _check_parents(hop: Leg, held: Manifest | None, manifest: Callable[[Version], Manifest]) -> None:
    """Raise Damaged unless the hop begins at the held version and its delta joins the two versions that it names."""
    own, parent = hop.manifest, hop.manifest.parent
    if parent is None:
        return
    before = manifest(parent.version) if hop.back else held
    begins = own if hop.back else before
    if before is None or held is None or begins is None or (before.version, before.digest) != (
        parent.version, parent.digest
    ) or held.digest != begins.digest:  # fmt: skip
        raise Damaged(
            f"version {own.version}: its delta begins with version {parent.version}, digest {parent.digest[:12]}, but "
            f"the weights are of version {before.version if before else None}, digest "
            f"{before.digest[:12] if before else None}"
        )
