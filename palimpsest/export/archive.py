"""Versions as a tar file: the sealed manifests and the objects of a version and of those on which it depends."""

import io
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3

from palimpsest.common.file_errors import file_errors_as_user_errors
from palimpsest.common.files import atomic_write
from palimpsest.common.snapshots.manifest import Damaged, Manifest, unseal
from palimpsest.common.text import count
from palimpsest.common.user_error import ExitCode, UserError
from palimpsest.export.stored_version import StoredVersions

MOST_MANIFEST = 32 << 20
"""Maximum size of a manifest, in bytes, as the store accepts it."""
ADDED, THERE, RESTORED = "added", "there", "restored"


def write_archive(stored: StoredVersions, version: int, path: Path) -> str:
    """Write a version and its chain. Return a sentence. Raises UserError; then no file is left."""
    chain = [stored.manifest(version)]
    with stored.whole_chain(version):
        while (parent := chain[-1].parent) is not None:
            chain.append(stored.manifest(parent.version))
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w|") as archive:  # a pipe has no positions
        for manifest in reversed(chain):  # the base first: an import adds no delta before its parent
            with stored.user_errors(f"version {manifest.version}"):
                with stored.object(manifest) as chunks:
                    body, start = b"".join(chunks), 0
                for each in manifest.objects:
                    _add(archive, f"objects/{each.digest}", body[start : start + each.size])
                    start += each.size
                _add(archive, f"versions/{manifest.version:08d}.json", stored.sealed(manifest.version))
    return f"{path}: {count(len(chain), 'version')}, digest {chain[0].digest}"


def read_archive(stored: StoredVersions, path: Path) -> str:
    """Add the versions of the file to the store. Return a sentence.

    Versions that the store holds with the same weights stay as they are, and get back objects that are missing or
    damaged. A version whose manifest is damaged is replaced. Raises UserError if the file is damaged, of another run,
    or holds other weights under a number of the store; nothing before that place is taken back.
    """
    bodies: dict[str, bytes] = {}
    outcomes = Counter[str]()
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with tarfile.open(path, mode="r:") as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is None:
                    raise Damaged(f"{member.name} is not a file")
                folder, _, name = member.name.partition("/")
                if folder == "objects":
                    bodies[name] = file.read()
                    if blake3(bodies[name]).hexdigest() != name:
                        raise Damaged(f"the bytes of object {name[:12]} have another digest")
                    continue
                if member.size > MOST_MANIFEST:
                    raise Damaged(f"{member.name} has {member.size} bytes")
                sealed = file.read()
                manifest = unseal(sealed)
                with file_errors_as_user_errors():  # of the store: the file itself is whole
                    outcomes[_import(stored, manifest, sealed, bodies)] += 1
                bodies.clear()
    except (OSError, tarfile.TarError, Damaged) as error:
        raise UserError(f"{path} is not a file of `palimpsest store export`: {error}", ExitCode.DAMAGED) from None
    restored = f", {outcomes[RESTORED]} were restored" if outcomes[RESTORED] else ""
    return f"{count(outcomes[ADDED], 'version')} added, {outcomes[THERE]} were there{restored}"


def _import(stored: StoredVersions, manifest: Manifest, sealed: bytes, bodies: Mapping[str, bytes]) -> str:
    """Return what became of the version."""
    if missing := [each.digest for each in manifest.objects if each.digest not in bodies]:
        raise Damaged(f"the object {missing[0][:12]} of version {manifest.version} is missing")
    stored.refuse_other_run(manifest)
    if manifest.version in stored.numbers():
        try:
            there = stored.manifest(manifest.version)
        except UserError as error:
            if error.code is not ExitCode.DAMAGED:
                raise
            return _replace(stored, manifest, sealed, bodies)
        if there.digest != manifest.digest:
            raise UserError(f"version {manifest.version} of the store has other weights: nothing was replaced")
        return RESTORED if stored.restore(there, bodies) else THERE
    if manifest.parent is not None and (
        manifest.parent.version not in stored.numbers()
        or stored.manifest(manifest.parent.version).digest != manifest.parent.digest
    ):
        raise Damaged(f"version {manifest.version} is a delta to version {manifest.parent.version}, which is missing")
    stored.add(manifest, sealed, bodies)
    return ADDED


def _replace(stored: StoredVersions, manifest: Manifest, sealed: bytes, bodies: Mapping[str, bytes]) -> str:
    """Store the version in place of one whose manifest is damaged. Only its deltas still name its weights."""
    for child, digest in stored.children(manifest.version).items():
        if digest != manifest.digest:
            raise UserError(
                f"version {child} of the store is a delta to other weights of version {manifest.version}: nothing was "
                f"replaced"
            )
    stored.replace(manifest, sealed, bodies)
    return RESTORED


def _add(archive: tarfile.TarFile, name: str, body: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(body)
    archive.addfile(member, io.BytesIO(body))
