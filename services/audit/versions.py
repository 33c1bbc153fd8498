"""The versions: what was announced against what stands, and who wrote it. Pure."""

from collections.abc import Iterator

from palimpsest.services.audit.evidence import Evidence, Finding, Kind


def needed_from(evidence: Evidence) -> int:
    """The lowest version that somebody may still need; 0 when nobody has said."""
    return min(evidence.leases.values(), default=0)


def judge_versions(evidence: Evidence) -> Iterator[Finding]:
    """Whether what was announced stands, as it was announced, in the order of the writers."""
    announced: dict[int, str] = {}
    for one in evidence.log.announced:
        standing = announced.setdefault(one.version, one.digest)
        if standing != one.digest:
            yield Finding(
                Kind.ANNOUNCED_TWICE,
                f"version {one.version} was announced as {standing[:12]} and as {one.digest[:12]}: tokens of it cannot "
                f"be told apart; stop the run and go on from a checkpoint before version {one.version}",
            )
    stored = {int(one.version): one for one in evidence.stored}
    for one in evidence.log.applied:
        if one.version in announced and announced[one.version] != one.digest:
            yield Finding(
                Kind.VERSION_DIGEST,
                f"{one.by} took on version {one.version} as {one.digest[:12]}, announced was "
                f"{announced[one.version][:12]}: it samples with other weights; stop it",
            )
    for version, digest in announced.items():
        if version in stored and stored[version].digest and stored[version].digest != digest:
            yield Finding(
                Kind.VERSION_DIGEST,
                f"version {version} stands in the store as {stored[version].digest[:12]}, announced was "
                f"{digest[:12]}: the store's files are another run's or were edited; restore them",
            )
    yield from _missing(evidence, announced)
    for stands in evidence.stored:
        if stands.trouble:
            yield Finding(
                Kind.OBJECT_DAMAGED,
                f"version {stands.version}: {stands.trouble}: restore the store's object from a copy",
            )
    checkpoint = evidence.checkpoint
    if checkpoint and checkpoint.digest and 0 in announced and checkpoint.digest not in announced.values():
        yield Finding(
            Kind.VERSION_DIGEST,
            f"checkpoint {checkpoint.name} names weights {checkpoint.digest[:12]}, which were never announced: it is "
            f"another run's; restore the folder",
        )
    yield from _fenced(evidence)


def _missing(evidence: Evidence, announced: dict[int, str]) -> Iterator[Finding]:
    stood = dict.fromkeys(announced, "was announced")
    stood |= {line.version: "was trained at" for line in evidence.lines if line.version not in stood}
    stands, lowest = {one.version for one in evidence.stored}, needed_from(evidence)
    for version in sorted(stood):
        if version >= lowest and version not in stands:
            holder = min(evidence.leases, key=evidence.leases.__getitem__, default=None)
            why = f"{holder}'s lease needs everything from {lowest} on" if holder else "no lease lets it go"
            yield Finding(
                Kind.VERSION_MISSING,
                f"version {version} {stood[version]} and is not in the store, though {why}: tokens of it cannot be "
                f"scored; restore the store from a copy",
            )


def _fenced(evidence: Evidence) -> Iterator[Finding]:
    versions = sorted((int(one.version), one.writer) for one in evidence.stored if one.writer)
    for what, written in (("version", versions), ("checkpoint of version", sorted(evidence.commits))):
        newest, since = 0, -1
        for version, writer in written:
            if writer > evidence.epoch:
                yield Finding(
                    Kind.FENCED_WRITER,
                    f"{what} {version} is by writer {writer}, an epoch that the store never issued (its newest is "
                    f"{evidence.epoch}): the store was put back from an older copy; restore it whole",
                )
            elif writer < newest:
                yield Finding(
                    Kind.FENCED_WRITER,
                    f"{what} {version} is by writer {writer}, though writer {newest} had begun with {since}: a "
                    f"replaced learner was let write; go on from a checkpoint of writer {newest} and report it",
                )
            if writer > newest:
                newest, since = writer, version
