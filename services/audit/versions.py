"""Compares the announced versions with those in the store, and checks their writers. Pure."""

from collections.abc import Iterator

from palimpsest.services.audit.evidence import Evidence, Finding, Kind


def needed_from(evidence: Evidence) -> int:
    """Return the lowest version that a lease holds; 0 without a lease."""
    return min(evidence.leases.values(), default=0)


def judge_versions(evidence: Evidence) -> Iterator[Finding]:
    """Yield findings about announced versions that are missing or differ, and about the order of writers."""
    announced: dict[int, str] = {}
    for one in evidence.log.announced:
        first = announced.setdefault(one.version, one.digest)
        if first != one.digest:
            yield Finding(
                Kind.ANNOUNCED_TWICE,
                f"version {one.version} was announced as {first[:12]} and as {one.digest[:12]}: its tokens cannot "
                f"be distinguished; stop the run and continue from a checkpoint before version {one.version}",
            )
    stored = {int(one.version): one for one in evidence.stored}
    for one in evidence.log.applied:
        if one.version in announced and announced[one.version] != one.digest:
            yield Finding(
                Kind.VERSION_DIGEST,
                f"{one.by} applied version {one.version} as {one.digest[:12]}, but it was announced as "
                f"{announced[one.version][:12]}: the worker samples with other weights; stop it",
            )
    for version, digest in announced.items():
        if version in stored and stored[version].digest and stored[version].digest != digest:
            yield Finding(
                Kind.VERSION_DIGEST,
                f"version {version} is in the store as {stored[version].digest[:12]}, but it was announced as "
                f"{digest[:12]}: the store's files belong to another run or were edited; restore them",
            )
    yield from _find_missing_versions(evidence, announced)
    for one_stored in evidence.stored:
        if one_stored.trouble:
            yield Finding(
                Kind.OBJECT_DAMAGED,
                f"version {one_stored.version}: {one_stored.trouble}: restore the store's object from a backup",
            )
    checkpoint = evidence.checkpoint
    if checkpoint and checkpoint.digest and 0 in announced and checkpoint.digest not in announced.values():
        yield Finding(
            Kind.VERSION_DIGEST,
            f"checkpoint {checkpoint.name} names weights {checkpoint.digest[:12]}, which were never announced: it "
            f"belongs to another run; restore the folder",
        )
    yield from _find_fenced_writers(evidence)


def _find_missing_versions(evidence: Evidence, announced: dict[int, str]) -> Iterator[Finding]:
    needed = dict.fromkeys(announced, "was announced")
    needed |= {line.version: "was trained at" for line in evidence.lines if line.version not in needed}
    existing, lowest = {one.version for one in evidence.stored}, needed_from(evidence)
    for version in sorted(needed):
        if version >= lowest and version not in existing:
            holder = min(evidence.leases, key=evidence.leases.__getitem__, default=None)
            why = (
                f"the lease of {holder} holds versions from {lowest} on" if holder else "no lease permits its deletion"
            )
            yield Finding(
                Kind.VERSION_MISSING,
                f"version {version} {needed[version]} and is not in the store, although {why}: its tokens cannot be "
                f"scored; restore the store from a backup",
            )


def _find_fenced_writers(evidence: Evidence) -> Iterator[Finding]:
    versions = sorted((int(one.version), one.writer) for one in evidence.stored if one.writer)
    for what, written in (("version", versions), ("checkpoint of version", sorted(evidence.commits))):
        newest, since = 0, -1
        for version, writer in written:
            if writer > evidence.epoch:
                yield Finding(
                    Kind.FENCED_WRITER,
                    f"{what} {version} has writer {writer}, an epoch that the store never issued (its newest is "
                    f"{evidence.epoch}): the store was restored from an older backup; restore all its files",
                )
            elif writer < newest:
                yield Finding(
                    Kind.FENCED_WRITER,
                    f"{what} {version} has writer {writer}, although writer {newest} had started with {since}: the "
                    f"store accepted a replaced learner; continue from a checkpoint of writer {newest} and report it",
                )
            if writer > newest:
                newest, since = writer, version
