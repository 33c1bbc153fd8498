"""Reads versions, leases and checkpoints from storage, without a running service."""

import asyncio
import re
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from blake3 import blake3

from palimpsest.common.snapshots.chain import ancestors
from palimpsest.common.snapshots.manifest import Damaged, Manifest, StoredObject, unseal
from palimpsest.common.versions import Version
from palimpsest.services.audit.evidence import AuditedCheckpoint, Finding, Kind, Stored
from palimpsest.services.learner.checkpointing.manifest import (
    MANIFEST,
    PROPOSED,
    SCHEMA,
    SHARDS,
    STATE,
    Progress,
    complete,
    file_digest,
    folder_name,
    version_and_writer,
)
from palimpsest.services.snapshot_store.storage import Storage
from palimpsest.services.snapshot_store.writers import CheckpointCommit, Writers

CHUNK = 1 << 20
_VERSION = re.compile(r"versions/(\d+)\.json")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint that the store accepted: its manifest, or the reason why it is unusable."""

    commit: CheckpointCommit
    progress: Progress | None
    trouble: str = ""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return folder_name(self.commit.version, self.commit.writer)


@dataclass(frozen=True, slots=True)
class Candidates:
    """All accepted checkpoints, oldest first, with the epoch of the newest writer."""

    each: tuple[Candidate, ...]
    epoch: int
    faults: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class CheckpointSearch:
    """The checkpoint from which a restart would continue, and the faults of the others."""

    in_force: AuditedCheckpoint | None
    history_bytes: int
    damaged: tuple[str, ...]
    """Faults of checkpoints that are newer than the one in force."""
    faults: tuple[Finding, ...]


@dataclass
class Versions:
    """The versions and leases in the store."""

    stored: tuple[Stored, ...] = ()
    leases: dict[str, int] = field(default_factory=dict)
    faults: list[Finding] = field(default_factory=list)


async def read_candidates(folder: Path, storage: Storage) -> Candidates:
    """Read the manifests of all accepted checkpoints; their states are not examined yet."""
    named = complete(folder)  # list before the store's, which accepts a checkpoint before that gets its final name
    writers, faults = Writers(storage, asyncio.Lock()), []
    epoch, committed = 0, list[CheckpointCommit]()
    try:
        await writers.open()
        newest = await writers.newest()
        epoch, committed = newest.epoch if newest else 0, await writers.committed()
        each = [_read_candidate(folder, commit) for commit in committed]
        if any(candidate.trouble for candidate in each):  # it may have been deleted during the reading
            still = await writers.committed()
            each = [candidate for candidate in each if not candidate.trouble or candidate.commit in still]
    except Damaged as damage:
        each = []
        faults.append(Finding(Kind.STORE_DAMAGED, f"the store's {damage}: restore the store from a backup"))
    return Candidates(tuple(each), epoch, (*faults, *_find_unknown_checkpoints(named, committed)))


async def choose(folder: Path, storage: Storage, candidates: Candidates, *, quick: bool) -> CheckpointSearch:
    """Return the checkpoint from which a restart continues: the newest intact one."""
    in_force, damaged, faults = None, [], []
    for candidate in reversed(candidates.each):
        trouble = candidate.trouble or _state_fault(folder / candidate.name, candidate.progress, quick=quick)
        if trouble:
            if candidate.commit not in await Writers(storage, asyncio.Lock()).committed():
                continue  # deleted during the reading
            fault = f"checkpoint {candidate.name}: {trouble}: a restart ignores it; restore its folder from a backup"
            if in_force is None:
                damaged.append(fault)
            else:
                faults.append(Finding(Kind.CHECKPOINT_DAMAGED, fault))
        elif in_force is None:
            in_force = candidate
    if in_force is None or in_force.progress is None:
        return CheckpointSearch(None, 0, tuple(damaged), tuple(faults))
    progress = in_force.progress
    return CheckpointSearch(
        _audited_checkpoint(in_force.name, progress), progress.history_bytes, tuple(damaged), tuple(faults)
    )


async def read_versions(storage: Storage, *, quick: bool) -> Versions:
    """Read every version and check its object. Leases are read after the versions, because they only rise."""
    read, manifests = Versions(), dict[Version, Manifest]()
    stored = []
    for key in await storage.keys("versions/"):
        match = _VERSION.fullmatch(key)
        body = await storage.read(key) if match else None
        if match is None or body is None:
            continue  # deleted during the reading
        number = Version(int(match[1]))
        try:
            manifests[number] = unseal(body)
            if manifests[number].version != number:
                raise Damaged(f"its manifest belongs to version {manifests[number].version}")
        except Damaged as damage:
            read.faults.append(
                Finding(Kind.VERSION_DAMAGED, f"version {number} ({key}): {damage}: restore the store from a backup")
            )
            manifests.pop(number, None)
            stored.append(Stored(number, "", 0, 0))
    if (leases := await storage.read("leases.json")) is not None:
        try:
            read.leases = msgspec.json.decode(leases, type=dict[str, int])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            read.faults.append(Finding(Kind.STORE_DAMAGED, f"leases.json: {error}: restore the store from a backup"))
    lowest, checked = min(read.leases.values(), default=0), dict[str, str]()
    needed = {number for number in manifests if number >= lowest or number == max(manifests)}
    needed |= ancestors(needed, lambda number: manifests[number].parent if number in manifests else None)
    for number in sorted(needed - set(manifests) - {one.version for one in stored}):
        if await storage.size(f"versions/{max(manifests):08d}.json") is not None:
            read.faults.append(
                Finding(Kind.VERSION_DAMAGED, f"version {number}, with which a delta begins, is not in the store")
            )
    for number, manifest in manifests.items():
        trouble = ""
        if number in needed:
            for each in manifest.objects:
                if each.digest not in checked:
                    checked[each.digest] = await _object_fault(storage, each, quick=quick)
                trouble = trouble or checked[each.digest]
            if trouble and await storage.size(f"versions/{number:08d}.json") is None:
                continue  # deleted during the reading
        stored.append(Stored(number, manifest.digest, manifest.writer, manifest.object_size, manifest.object, trouble))
    read.stored = tuple(sorted(stored, key=lambda one: one.version))
    return read


async def _object_fault(storage: Storage, expected: StoredObject, *, quick: bool) -> str:
    """Return the fault of an object of a version; empty if it has none."""
    key, name = f"objects/{expected.digest}", f"its object {expected.digest[:12]}"
    size = await storage.size(key)
    if size is None:
        return f"{name} is not in the store"
    if size != expected.size:
        return f"{name} has {size} bytes in place of {expected.size}"
    if quick:
        return ""
    hasher = blake3()
    try:
        async for chunk in storage.stream(key):
            hasher.update(chunk)
    except KeyError:
        return f"{name} is not in the store"
    found = hasher.hexdigest()
    return "" if found == expected.digest else f"the bytes of {name} have the digest {found[:12]}"


def _find_unknown_checkpoints(named: list[Path], committed: list[CheckpointCommit]) -> list[Finding]:
    newest = max(((int(commit.version), commit.writer) for commit in committed), default=(-1, 0))
    return [
        Finding(
            Kind.CHECKPOINT_UNKNOWN,
            f"checkpoint {folder.name} is newer than any that the store accepted: the store was emptied, restored from "
            f"an older backup, or belongs to another run; restore it",
        )
        for folder in named
        if (place := version_and_writer(folder.name)) is None or place > newest
    ]


def _read_candidate(folder: Path, commit: CheckpointCommit) -> Candidate:
    place = folder / folder_name(commit.version, commit.writer)
    try:
        body = (place / (MANIFEST if (place / MANIFEST).exists() else PROPOSED)).read_bytes()
        if blake3(body).hexdigest() != commit.digest:
            return Candidate(commit, None, "its manifest is not the one that the store accepted")
        progress = msgspec.json.decode(body, type=Progress)
    except (OSError, ValueError, msgspec.DecodeError) as error:
        return Candidate(commit, None, str(error))
    if progress.schema != SCHEMA:
        return Candidate(commit, None, f"its schema is {progress.schema}, but this release reads {SCHEMA}")
    return Candidate(commit, progress)


def _state_fault(folder: Path, progress: Progress | None, *, quick: bool) -> str:
    """Return the fault of the checkpoint's files; empty if they have none."""
    assert progress is not None
    hasher = blake3()
    try:
        with (folder / STATE).open("rb") as file:
            while not quick and (chunk := file.read(CHUNK)):
                hasher.update(chunk)
    except OSError as error:
        return str(error)
    if not quick and hasher.hexdigest() != progress.state_digest:
        return "its state does not match its digest"
    for name, digest in progress.shards.items():
        try:
            (folder / SHARDS / name).stat()
            if not quick and file_digest(folder / SHARDS / name) != digest:
                return f"its file {SHARDS}/{name} does not match its digest"
        except OSError as error:
            return str(error)
    return ""


def _audited_checkpoint(name: str, progress: Progress) -> AuditedCheckpoint:
    return AuditedCheckpoint(
        name=name,
        version=progress.version,
        writer=progress.writer,
        digest=progress.digest,
        trained_versions=progress.trained_versions,
        ledger=progress.ledger,
        offsets=progress.offsets,
        task_offsets=progress.task_offsets,
        evaluated=tuple(map(int, progress.evaluation.evaluated)),
    )
